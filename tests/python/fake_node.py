"""A node without a model: an engine, adapters and a controller in memory."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from loraserve.controller.admission import PackedFacts
from loraserve.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    InvalidCheckpointError,
    NotFoundError,
)
from loraserve.node.engine_api import LoadedModel, ModelFacts
from loraserve.node.limits import Limits
from loraserve.node.server import NodeOptions, NodeServer
from loraserve.node.sources import Blob, Packed
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
class FakeStats:
    running: int = 0
    waiting: int = 0
    pages_free: int = 90
    pages_kv: int = 8
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
        self.unloaded: list[str] = []
        # Cleared: loads block in their thread.
        self.may_load = threading.Event()
        self.may_load.set()
        self.load_error: Exception | None = None
        self.closed = False
        self.backend_name = "fake"

    @staticmethod
    def token(call: dict[str, Any], index: int) -> int:
        return len(call["prompt"]) + index

    def load_adapter(self, name: str, source: Any, *, allow_base_mismatch: bool = False) -> str:
        assert self.may_load.wait(10)
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

    def stats(self) -> FakeStats:
        return FakeStats(running=len(self.live))

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class FakePacked:
    revision: str
    size_bytes: int
    max_rank: int = 8
    base_name: str = BASE


def revision(letter: str) -> str:
    return letter * 64


def blob(letter: str, size: int = 100) -> bytes:
    """What `read_fake` takes for the packed adapter of revision(letter)."""
    return letter.encode() * size


def read_fake(source: Blob) -> Packed:
    data = source.read_bytes() if isinstance(source, Path) else source
    if len(set(data)) != 1:
        raise InvalidCheckpointError("chunk 0", "does not agree with the header")
    return FakePacked(chr(data[0]) * 64, len(data))


def inspect_fake(path: Path) -> PackedFacts:
    """Admission's view of the same."""
    packed = read_fake(path)
    return PackedFacts(packed.revision, BASE, packed.size_bytes, packed.max_rank)


class FakeSource:
    """Blobs by revision. `gate`, where set, holds every fetch until it is set."""

    name = "fake"

    def __init__(self, *letters: str) -> None:
        self.blobs = {revision(letter): blob(letter) for letter in letters}
        self.fetches: list[str] = []
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None

    async def fetch(self, wanted: str, max_bytes: int) -> Blob:
        self.fetches.append(wanted)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        if wanted not in self.blobs:
            raise NotFoundError("revision", "is not here")
        return self.blobs[wanted]


def spec(name: str, letter: str, size: int = 100, tenant: str = "default") -> AdapterSpec:
    return AdapterSpec(AdapterId(tenant, BASE, name), revision(letter), size, 8)


@contextlib.asynccontextmanager
async def serving(
    engine: FakeEngine,
    store: Path | None = None,
    limits: Limits | None = None,
    on_server: Callable[[NodeServer], None] = lambda server: None,
    **options: Any,
) -> AsyncIterator[tuple[NodeServer, grpc.aio.Channel]]:
    """A whole node on a free loopback port, and a channel to it."""
    given = NodeOptions(
        base=BASE,
        limits=limits or Limits(),
        store=str(store) if store else None,
        **{"node_id": "n1", "drain_timeout_s": 0.2, **options},
    )
    server = NodeServer(given, lambda: LoadedModel(engine, FACTS), read_fake, read_fake)
    on_server(server)
    try:
        await server.start()
        async with dial(server.address) as channel:
            yield server, channel
    finally:
        await server.stop()


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    """Waits for the condition, which another task brings about."""
    end = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, f"never happened: {what}"
        await asyncio.sleep(0.005)
