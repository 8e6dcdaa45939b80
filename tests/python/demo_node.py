"""A node in this process with the real engine and the demo model."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio

from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME, adapter_directory
from loraserve.node.limits import Limits
from loraserve.node.model import ModelOptions, open_model, read_adapter
from loraserve.node.peers.peering import OFF, PeerOptions
from loraserve.node.pool.options import PoolOptions
from loraserve.node.server import NodeOptions, NodeServer
from loraserve.wire import dial


@contextlib.asynccontextmanager
async def serving_demo(
    *skills: str,
    memory_bytes: int = 64 << 20,
    max_sequences: int = 64,
    adapters: dict[str, Path] | None = None,
    limits: Limits | None = None,
    store: Path | None = None,
    pool: PoolOptions = PoolOptions(host_pool_bytes=16 << 20),  # noqa: B008
    **more: Any,
) -> AsyncIterator[tuple[NodeServer, grpc.aio.Channel]]:
    """With the adapters of these skills, under their names."""
    model = ModelOptions(
        MODEL_DIRECTORY,
        MODEL_NAME,
        memory_bytes=memory_bytes,
        max_sequences=max_sequences,
        threads=1,
    )
    options = NodeOptions(
        node_id="n1",
        base=MODEL_NAME,
        limits=limits or Limits(max_sequences=max_sequences),
        store=str(store) if store else None,
        drain_timeout_s=0.2,
        peers=PeerOptions(OFF),
        pool=pool,
        adapters={skill: adapter_directory(skill) for skill in skills} | (adapters or {}),
        **more,
    )
    server = NodeServer(options, lambda: open_model(model), read_adapter)
    try:
        await server.start()
        async with dial(server.address) as channel:
            yield server, channel
    finally:
        await server.stop()
