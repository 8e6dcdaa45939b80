"""A node without a model: an engine, adapters and a controller in memory."""

import asyncio
import contextlib
import functools
import string
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import load_adapter_source, pack
from loraserve.checkpoint.packed_header import PackedHeader, parse_header
from loraserve.errors import AlreadyExistsError, DeadlineExceededError, NotFoundError
from loraserve.node.engine_api import LoadedModel, ModelFacts
from loraserve.node.fetch import AdapterFetch
from loraserve.node.limits import Limits
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.peers.peering import OFF, PeerOptions
from loraserve.node.pool.arena import HostArena
from loraserve.node.pool.checked_writer import CheckedWriter
from loraserve.node.pool.copies import HostCopies
from loraserve.node.pool.options import PoolOptions
from loraserve.node.pool.slots import HostPool, slot_bytes
from loraserve.node.server import NodeOptions, NodeServer
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.sampling_params import SamplingParams
from loraserve.wire import dial

BASE = "tiny"
VOCAB = 1000
CONTEXT = 128
FACTS = ModelFacts(BASE, "d" * 64, CONTEXT, VOCAB)


@dataclass
class FakeChunk:
    first_index: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str | None = ""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 3
    queue_s: float = 0.0
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None


class FakeStream:
    def __init__(self, engine: "FakeEngine", request_id: str, call: dict[str, Any]) -> None:
        self.engine, self.request_id, self.call = engine, request_id, call
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True

    async def chunks(self) -> AsyncIterator[FakeChunk]:
        params: SamplingParams = self.call["params"]
        started = asyncio.get_running_loop().time()
        timeout_s = self.call["timeout_s"]
        try:
            for index in range(params.max_tokens):
                await asyncio.sleep(self.engine.step_s)
                await self.engine.may_step.wait()
                while index == self.engine.stops_at and not self.aborted:
                    await asyncio.sleep(0.005)
                if self.aborted:
                    yield FakeChunk(index, finish_reason="cancelled")
                    return
                if timeout_s and asyncio.get_running_loop().time() - started > timeout_s:
                    raise DeadlineExceededError("deadline", "has passed")
                token = self.engine.token(self.call, index)
                last = index == params.max_tokens - 1
                yield FakeChunk(
                    index,
                    [token],
                    f"<{token}>",
                    [] if params.logprobs is None else [-0.5],
                    [{token: -0.5, 7: -2.0, 9: -1.0}] if params.logprobs else [],
                    "length" if last else None,
                    queue_s=0.0 if index else self.engine.queue_s,
                )
        finally:
            self.engine.live.discard(self.request_id)
            self.engine.ended.append(self.request_id)


@dataclass
class FakeStep:
    keys: list[Any] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    others: list[tuple[Any, Any]] = field(default_factory=list)


class FakeSunk:
    """A stream whose chunks go to a sink, as an engine would give them out."""

    def __init__(self, sink: Any, key: Any, stream: FakeStream) -> None:
        self.sink, self.key, self.stream = sink, key, stream
        self.abort = stream.abort
        self.task = asyncio.create_task(self._pump())

    async def _pump(self) -> None:
        others: Any = []
        try:
            async for chunk in self.stream.chunks():
                plain = chunk.first_index > 0 and not chunk.finish_reason and not chunk.logprobs
                if plain:
                    self.sink.take(FakeStep([self.key], chunk.token_ids))
                else:
                    self.sink.take(FakeStep(others=[(self.key, chunk)]))
        except Exception as error:
            others = [(self.key, error)]
        self.sink.take(FakeStep(others=others))

    def chunk(self, output: Any) -> Any:
        if isinstance(output, Exception):
            raise output
        return output

    def close(self) -> None:
        self.task.cancel()


@dataclass
class FakeStats:
    running: int = 0
    waiting: int = 0
    pages_free: int = 90
    pages_kv: int = 8
    adapters_installing: int = 0
    adapter_installs: int = 0
    adapter_evictions: int = 0
    adapter_install_seconds: float = 0.0
    adapter_waits: int = 0
    adapter_wait_seconds: float = 0.0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    pages_adapter: int = 2


class FakeEngine:
    """Answers at once or every `step_s` seconds with the position of each token."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.queue_s = 0.0
        self.live: set[str] = set()
        self.ended: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.loaded: dict[str, Any] = {}
        self.in_pages: set[str] = set()
        # Cleared: steps stand still in their middle, where no abort ends them.
        self.may_step = asyncio.Event()
        self.may_step.set()
        # Streams stand still before their token of this index, until they are aborted.
        self.stops_at: int | None = None
        self.unloaded: list[str] = []
        # Cleared: loads block in their thread.
        self.may_load = threading.Event()
        self.may_load.set()
        self.load_error: Exception | None = None
        self.has_gpu = False
        self.register_error: Exception | None = None
        self.registered: list[memoryview] = []
        self.closed = False
        self.backend_name = "fake"

    @staticmethod
    def token(call: dict[str, Any], index: int) -> int:
        return len(call["prompt"]) + index

    def load_adapter(self, name: str, source: Any, *, allow_base_mismatch: bool = False) -> str:
        assert self.may_load.wait(60)
        if self.load_error is not None:
            raise self.load_error
        assert name not in self.loaded
        self.loaded[name] = source
        return str(source.revision)

    def unload_adapter(self, name: str, timeout_s: float | None = None) -> None:
        if self.loaded.pop(name, None) is None:
            raise NotFoundError("adapter", f"{name!r} is not loaded")
        self.unloaded.append(name)

    def installed(self) -> frozenset[str]:
        return frozenset(self.in_pages & set(self.loaded))

    def register_host_memory(self, memory: memoryview) -> bool:
        if self.register_error is not None:
            raise self.register_error
        self.registered.append(memory)
        return self.has_gpu

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        return [ord(c) % VOCAB for c in prompt] if isinstance(prompt, str) else list(prompt)

    def submit(self, prompt: Any, params: Any = None, adapter: Any = None, **more: Any) -> Any:
        if adapter is not None and adapter not in self.loaded:
            raise NotFoundError("adapter", f"{adapter!r} is not loaded")
        if more["request_id"] in self.live:
            raise AlreadyExistsError("request_id", "is in use")
        call = {"prompt": list(prompt), "params": params, "adapter": adapter, **more}
        self.calls.append(call)
        self.live.add(more["request_id"])
        return FakeStream(self, more["request_id"], call)

    def submit_to(
        self, sink: Any, key: Any, prompt: Any, params: Any, adapter: Any = None, **more: Any
    ) -> Any:
        return FakeSunk(sink, key, self.submit(prompt, params, adapter, **more))

    def stats(self) -> FakeStats:
        return FakeStats(running=len(self.live))

    def close(self) -> None:
        self.closed = True


@functools.cache
def blob(letter: str) -> bytes:
    """A small packed adapter of rank 8, another one for each letter. A slot of it is one page."""
    weights = np.full((8, 16), ord(letter), np.float16)
    return pack(
        AdapterSource(BASE, (AdapterModule(0, "q_proj", 8, 1.0, "F16", weights, weights.T),))
    )


@functools.cache
def revision(letter: str) -> str:
    return parse_header(blob(letter)).revision


SIZE = len(blob("a"))


def pool_bytes(adapters: int) -> int:
    """A host pool for so many of these."""
    return adapters * slot_bytes(SIZE)


def letter_of(wanted: str) -> str:
    return next(c for c in string.ascii_lowercase if revision(c) == wanted)


class FakeSource:
    """Blobs by revision. `gate`, where set, holds every fetch until it is set."""

    name = "fake"

    def __init__(self, *letters: str) -> None:
        self.blobs = {revision(letter): blob(letter) for letter in letters}
        self.fetches: list[str] = []
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None

    async def read_start(self, load: AdapterLoadInfo) -> bytes:
        wanted = load.spec.revision
        if wanted not in self.blobs:
            raise NotFoundError("revision", "is not here")
        return self.blobs[wanted][: SIZE - 1]

    async def read_into(
        self, load: AdapterLoadInfo, header: PackedHeader, writer: CheckedWriter
    ) -> None:
        wanted = load.spec.revision
        self.fetches.append(wanted)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        if wanted not in self.blobs:
            raise NotFoundError("revision", "is not here")
        writer.write(self.blobs[wanted][writer.position :])


def host_copies(memory: int, *sources: Any, **options: Any) -> HostCopies:
    """An empty host pool that is filled from `sources`."""
    fetch = AdapterFetch(sources, max_bytes=1 << 30, **options)
    return HostCopies(HostPool(HostArena(memory), time.monotonic), fetch)


def spec(name: str, letter: str, size: int = SIZE, tenant: str = "default") -> AdapterSpec:
    return AdapterSpec(AdapterId(tenant, BASE, name), revision(letter), size, 8)


def load_of(name: str, letter: str, size: int = SIZE) -> AdapterLoadInfo:
    return AdapterLoadInfo(spec(name, letter, size))


@contextlib.asynccontextmanager
async def serving(
    engine: FakeEngine,
    store: Path | None = None,
    limits: Limits | None = None,
    on_server: Callable[[NodeServer], None] = lambda server: None,
    facts: ModelFacts = FACTS,
    **options: Any,
) -> AsyncIterator[tuple[NodeServer, grpc.aio.Channel]]:
    """A whole node on a free loopback port, and a channel to it."""
    given = NodeOptions(
        base=BASE,
        limits=limits or Limits(),
        store=str(store) if store else None,
        **{
            "node_id": "n1",
            "drain_timeout_s": 0.2,
            "pool": PoolOptions(host_pool_bytes=64 << 10),
            "peers": PeerOptions(OFF),
            **options,
        },
    )
    server = NodeServer(given, lambda: LoadedModel(engine, facts), load_adapter_source)
    on_server(server)
    try:
        await server.start()
        async with dial(server.address) as channel:
            yield server, channel
    finally:
        await server.stop()


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Waits for the condition, which another task brings about."""
    end = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"never happened: {what}"
        await asyncio.sleep(0.005)
