"""Adapters of several chunks, and fetches of them into a pool of their own."""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.durable_store import DurableStore
from loraserve.checkpoint.packed_adapter import pack
from loraserve.checkpoint.packed_header import PackedHeader, parse_header
from loraserve.node.fetch import AdapterFetch
from loraserve.node.load_info import AdapterLoadInfo, Peer
from loraserve.node.pool.arena import HostArena
from loraserve.node.pool.checked_writer import CheckedWriter
from loraserve.node.pool.slots import HostPool
from loraserve.placement.types import AdapterId, AdapterSpec


@functools.cache
def large(seed: int = 1, chunks: int = 3) -> bytes:
    """A packed adapter of rank 16; the last chunk is short."""
    width = ((chunks << 20) - 1000) // (2 * 16 * 2)
    weights = np.random.default_rng(seed).integers(0, 0x3C00, (16, width), np.uint16)
    module = AdapterModule(
        0, "q_proj", 16, 1.0, "F16", weights.view(np.float16), weights.T.view(np.float16)
    )
    return pack(AdapterSource("tiny", (module,)))


@functools.cache
def header_of(data: bytes) -> PackedHeader:
    return parse_header(data)


def load_of(
    data: bytes, *, peers: tuple[Peer, ...] = (), size: int | None = None
) -> AdapterLoadInfo:
    header = header_of(data)
    size = header.size_bytes if size is None else size
    adapter = AdapterId("default", "tiny", "sql")
    return AdapterLoadInfo(AdapterSpec(adapter, header.revision, size, header.max_rank), peers)


def put(store: DurableStore, data: bytes, content: bytes | None = None) -> Path:
    """The file of the adapter in a local store, which has `content` instead where it is given."""
    path = Path(store.path_of(header_of(data).revision))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if content is None else content)
    return path


def flipped(data: bytes, at: int) -> bytes:
    bad = bytearray(data)
    bad[at] ^= 0x20
    return bytes(bad)


class MemorySource:
    """Gives `data` in pieces of `piece` bytes; `before` runs before each of them."""

    def __init__(self, data: bytes, name: str = "memory", *, piece: int = 300_000) -> None:
        self.data = data
        self.name = name
        self.piece = piece
        self.started = 0
        self.reads: list[AdapterLoadInfo] = []
        self.before: Callable[[], Awaitable[None]] | None = None

    async def read_start(self, load: AdapterLoadInfo) -> bytes:
        self.started += 1
        return self.data[: header_of(large()).header_bytes]

    async def read_into(
        self, load: AdapterLoadInfo, header: PackedHeader, writer: CheckedWriter
    ) -> None:
        self.reads.append(load)
        while writer.position < len(self.data):
            if self.before is not None:
                await self.before()
            writer.write(self.data[writer.position : writer.position + self.piece])


def hurry(monkeypatch: Any, hanging: str, seconds: float) -> None:
    """The source of this name is given up so soon; the others have a minute, on any machine."""
    in_time = AdapterFetch._in_time

    async def hurried(fetch: AdapterFetch, name: str, reading: Any, limit_s: float) -> Any:
        return await in_time(fetch, name, reading, seconds if name == hanging else 60.0)

    monkeypatch.setattr(AdapterFetch, "_in_time", hurried)


@functools.cache
def arena() -> HostArena:
    """One for all tests: faulting it in takes its time."""
    return HostArena(16 << 20, 0)


async def fetch_into_pool(load: AdapterLoadInfo, fetch: AdapterFetch) -> tuple[bytes, str]:
    """What lies in the slot afterwards, and the source that it came from."""
    pool = HostPool(arena(), time.monotonic)
    start = await fetch.start(load)
    writer = pool.reserve(start.header.size_bytes)
    # Another fetch may have left the right bytes here.
    writer.view[:] = bytes(writer.size_bytes)
    try:
        source = await fetch.fill(load, start, writer)
        return bytes(writer.view), source
    finally:
        writer.abandon()


def fetched(load: AdapterLoadInfo, *lasting: Any, **options: Any) -> tuple[bytes, str]:
    fetch = AdapterFetch(lasting, **{"max_bytes": 1 << 30, **options})
    found = []

    async def run() -> (
        None
    ):  # asyncio writes down what a task returns, and megabytes take their time
        found.append(await fetch_into_pool(load, fetch))

    asyncio.run(run())
    return found[0]
