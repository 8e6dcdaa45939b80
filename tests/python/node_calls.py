"""How the tests call a node: requests with the defaults that most of them want."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
from fake_node import blob, revision

from loraserve.errors import LoraServeError
from loraserve.v1 import common_pb2, inference_pb2_grpc, node_pb2_grpc
from loraserve.v1.inference_pb2 import GenerateRequest, TokenIds
from loraserve.wire_errors import from_rpc_error


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))  # type: ignore[arg-type]


def request(request_id: str = "r", **fields: Any) -> GenerateRequest:
    sampling = fields.pop("sampling", {"max_tokens": 3})
    if "text" not in fields:
        fields.setdefault("token_ids", TokenIds(ids=[5, 6]))
    return GenerateRequest(
        request_id=request_id, sampling=common_pb2.SamplingParams(**sampling), **fields
    )


def generate(channel: grpc.aio.Channel, *args: Any, **fields: Any) -> Any:
    """The running call; `timeout` of the RPC is `rpc_timeout`."""
    metadata, timeout = fields.pop("metadata", ()), fields.pop("rpc_timeout", 60)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    return stub.Generate(request(*args, **fields), metadata=metadata, timeout=timeout)


async def answers(channel: grpc.aio.Channel, *args: Any, **fields: Any) -> list[Any]:
    return [message async for message in generate(channel, *args, **fields)]


def node_service(channel: grpc.aio.Channel) -> Any:
    return node_pb2_grpc.NodeServiceStub(channel)


async def refused(wait: Awaitable[Any]) -> LoraServeError:
    try:
        await wait
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("was not refused")


def store_with(tmp_path: Path, *letters: str) -> Path:
    """A durable store that holds the blobs of these letters."""
    for letter in letters:
        folder = tmp_path / "store" / revision(letter)[:2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{revision(letter)}.lora").write_bytes(blob(letter))
    return tmp_path / "store"
