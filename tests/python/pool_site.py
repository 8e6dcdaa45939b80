"""The demo's adapters in stores, and questions to a node that serves them."""

import asyncio
import functools
from pathlib import Path
from typing import Any

import grpc.aio
from node_calls import answers
from pool_fixtures import header_of

from loraserve.checkpoint.durable_store import DurableStore
from loraserve.checkpoint.packed_adapter import load_adapter_source
from loraserve.demo import MODEL_NAME, adapter_directory
from loraserve.demo.skills import SKILLS, prompt
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.server import NodeServer
from loraserve.placement.types import AdapterId, AdapterSpec

SKILL = {skill.name: skill for skill in SKILLS}
WORD = "apple"


@functools.cache
def packed(skill: str) -> bytes:
    return bytes(load_adapter_source(adapter_directory(skill)).blob)


def load_info(skill: str) -> AdapterLoadInfo:
    header = header_of(packed(skill))
    adapter = AdapterId("default", MODEL_NAME, skill)
    return AdapterLoadInfo(
        AdapterSpec(adapter, header.revision, header.size_bytes, header.max_rank)
    )


def fill(store: Path, *skills: str) -> None:
    """Each skill's packed adapter in a local store."""
    for skill in skills:
        path = blob_path(store, skill)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(skill))


def blob_path(store: Path, skill: str) -> Path:
    return Path(DurableStore(str(store)).path_of(header_of(packed(skill)).revision))


async def ask(channel: grpc.aio.Channel, skill: str, metadata: Any = None) -> str:
    out = await answers(
        channel,
        text=prompt(WORD),
        adapter={"name": skill},
        sampling={"max_tokens": 24, "temperature": 0.0, "stop": ["\n"]},
        metadata=metadata or (),
        rpc_timeout=60,
    )
    return "".join(message.text for message in out)


def counter(server: NodeServer, name: str, **labels: str) -> float:
    return server.metrics.registry.get_sample_value(name, labels) or 0.0


def reads(server: NodeServer, source: str, outcome: str) -> float:
    return counter(server, "loraserve_adapter_reads_total", source=source, outcome=outcome)


def run(test: Any, limit_s: float = 180) -> None:
    asyncio.run(asyncio.wait_for(test(), limit_s))
