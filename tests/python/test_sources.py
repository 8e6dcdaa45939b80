"""Where a node's adapters come from: whatever a source sends, only the right bytes get through."""

import asyncio
import contextlib
import os
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import fsspec
import grpc.aio
import numpy as np
import pytest
from fake_node import FakeSource, blob, read_fake, revision, spec
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.durable_store import DurableStore
from loraserve.checkpoint.packed_adapter import pack, parse_packed
from loraserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    InvalidCheckpointError,
    LoraServeError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraserve.node import sources
from loraserve.node.sources import AdapterFetch, ControllerSource, Packed, StoreSource
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.v1 import adapter_pb2, adapter_pb2_grpc
from loraserve.wire import SERVER_OPTIONS, bind, dial
from loraserve.wire_errors import typed_errors

A = revision("a")
LIMIT = 1 << 20


def fetch(spec: AdapterSpec, *given: Any, read: Any = read_fake) -> Packed:
    return asyncio.run(AdapterFetch(given, LIMIT, read).fetch(spec))


def put(store: DurableStore, name: str, data: bytes) -> Path:
    path = Path(store.path_of(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# The durable store


def test_a_local_store_is_mapped_and_a_remote_one_is_read(tmp_path: Path) -> None:
    local = DurableStore(str(tmp_path))
    path = put(local, A, blob("a"))
    assert asyncio.run(StoreSource(local).fetch(A, LIMIT)) == path
    remote = DurableStore("memory://adapters")
    (tmp_path / "blob").write_bytes(blob("a"))
    remote.put(A, tmp_path / "blob")
    assert asyncio.run(StoreSource(remote).fetch(A, LIMIT)) == blob("a")
    fsspec.filesystem("memory").rm("/adapters", recursive=True)


def test_a_store_that_lacks_a_blob_or_holds_too_much(tmp_path: Path) -> None:
    store = DurableStore(str(tmp_path))
    with pytest.raises(NotFoundError, match="revision: "):
        fetch(spec("sql", "a"), StoreSource(store))
    put(store, A, blob("a", 101))
    with pytest.raises(ResourceExhaustedError, match="101 bytes, over the 100"):
        fetch(spec("sql", "a"), StoreSource(store))
    with pytest.raises(ResourceExhaustedError, match="101 bytes, over the 99"):
        asyncio.run(AdapterFetch([StoreSource(store)], 99, read_fake).fetch(spec("s", "a", size=0)))


def test_a_blob_that_grows_while_it_is_read_is_cut_off(tmp_path: Path) -> None:
    remote = DurableStore("memory://adapters")
    (tmp_path / "blob").write_bytes(blob("a", 300))
    remote.put(A, tmp_path / "blob")
    remote.size_bytes = lambda revision: 100  # type: ignore[method-assign]
    with pytest.raises(ResourceExhaustedError, match="300 bytes, over the 100"):
        asyncio.run(StoreSource(remote).fetch(A, 100))
    fsspec.filesystem("memory").rm("/adapters", recursive=True)


def test_a_store_that_fails_or_hangs_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DurableStore(str(tmp_path))

    def broken(revision: str) -> int:
        raise OSError(5, "Input/output error")

    returned = threading.Event()

    def hanging(revision: str) -> int:
        returned.wait(8)
        return 1

    store.size_bytes = broken  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match=r"store: .*Input/output error"):
        fetch(spec("sql", "a"), StoreSource(store))
    monkeypatch.setattr(sources, "STALL_S", 0.002)
    store.size_bytes = hanging  # type: ignore[method-assign]
    begin = time.monotonic()
    with pytest.raises(UnavailableError, match=r"store: took over 0.04 s"):
        fetch(spec("sql", "a"), StoreSource(store))
    # The loop has been closed, as at the end of a process: nothing waited for the thread.
    assert time.monotonic() - begin < 4
    returned.set()


def test_what_killed_writers_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    store = DurableStore(str(tmp_path / "store"))
    blob_path = put(store, A, blob("a"))
    old, new = (blob_path.with_name(f"{blob_path.name}.{word}.part") for word in ("aa", "bb"))
    for path in (old, new, blob_path):
        path.write_bytes(blob("a"))
    for path in (old, blob_path):
        os.utime(path, (time.time() - 90_000,) * 2)
    store.remove_staged()
    assert sorted(blob_path.parent.iterdir()) == [blob_path, new]


# What must agree before it is used


def test_what_comes_must_be_what_was_asked_for() -> None:
    source = FakeSource("a")
    assert fetch(spec("sql", "a"), source).revision == A
    source.blobs[A] = blob("b")
    with pytest.raises(InvalidCheckpointError, match=f"revision: asked for {A}"):
        fetch(spec("sql", "a"), source)
    source.blobs[A] = blob("a", 99)
    with pytest.raises(InvalidCheckpointError, match="size_bytes: 99, announced were 100"):
        fetch(spec("sql", "a"), source)
    source.blobs[A] = blob("a")
    wrong = AdapterSpec(AdapterId("default", "tiny", "sql"), A, 100, 16)
    with pytest.raises(FailedPreconditionError, match="max_rank: 8, announced was 16"):
        fetch(wrong, source)


def test_sources_are_asked_in_order_until_one_has_it(caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = FakeSource(), FakeSource("a"), FakeSource("a")
    assert fetch(spec("sql", "a"), first, second, third).revision == A
    assert [len(s.fetches) for s in (first, second, third)] == [1, 1, 0]
    for trouble in (
        UnavailableError("store", "is away"),
        InvalidCheckpointError("chunk 1", "does not agree"),
        ResourceExhaustedError("adapter", "too large"),
        ValueError("a driver's own error"),
    ):
        first.error = trouble
        assert fetch(spec("sql", "a"), first, second).revision == A
    assert "a driver's own error" in caplog.text
    # What a source with the revision said counts more than that another one lacks it.
    first.error = InvalidCheckpointError("chunk 1", "does not agree")
    with pytest.raises(InvalidCheckpointError, match="chunk 1"):
        fetch(spec("sql", "a"), first, FakeSource())
    with pytest.raises(NotFoundError, match="is not here"):
        fetch(spec("sql", "a"), FakeSource(), FakeSource())
    with pytest.raises(NotFoundError, match="no source of adapters"):
        fetch(spec("sql", "a"))


def real() -> bytes:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((3, 16), dtype=np.float32)
    b = rng.standard_normal((24, 3), dtype=np.float32)
    return pack(AdapterSource("base", (AdapterModule(0, "q_proj", 3, 2.0, "F32", a, b),)))


REAL = real()
REAL_REVISION = parse_packed(REAL).revision
REAL_SPEC = AdapterSpec(AdapterId("default", "base", "sql"), REAL_REVISION, len(REAL), 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_real_blob_gets_through_whole_or_not_at_all(data: st.DataObject) -> None:
    bad = bytearray(REAL)
    match data.draw(st.sampled_from(["flip", "cut", "more"])):
        case "flip":
            position = data.draw(st.integers(0, len(REAL) - 1))
            bad[position] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del bad[data.draw(st.integers(0, len(REAL) - 1)) :]
        case "more":
            bad += b"\0" * data.draw(st.integers(1, 64))
    source = FakeSource()
    source.blobs[REAL_REVISION] = REAL
    assert fetch(REAL_SPEC, source, read=sources.read_packed).max_rank == 3
    source.blobs[REAL_REVISION] = bytes(bad)
    for size in (len(REAL), 0):
        known = AdapterSpec(REAL_SPEC.adapter, REAL_REVISION, size, 3)
        with pytest.raises(InvalidArgumentError):  # another format version is unsupported
            fetch(known, source, read=sources.read_packed)


def test_a_broken_file_of_a_local_store_is_refused(tmp_path: Path) -> None:
    store = DurableStore(str(tmp_path))
    path = put(store, REAL_REVISION, REAL)
    assert fetch(REAL_SPEC, StoreSource(store), read=sources.read_packed).size_bytes == len(REAL)
    for length in (0, 7, len(REAL) // 2, len(REAL) - 1):
        path.write_bytes(REAL[:length])
        with pytest.raises(InvalidCheckpointError):
            fetch(REAL_SPEC, StoreSource(store), read=sources.read_packed)
    path.unlink()
    path.mkdir()
    with pytest.raises(LoraServeError):
        fetch(REAL_SPEC, StoreSource(store), read=sources.read_packed)


# The controller


class Scripted(adapter_pb2_grpc.AdapterServiceServicer):
    """Sends what it is given, then waits for `stall_s`."""

    def __init__(self, parts: Iterable[tuple[bytes, int] | Exception], stall_s: float) -> None:
        self.parts = parts
        self.stall_s = stall_s
        self.asked: list[str] = []
        self.ended = False

    @typed_errors
    async def ReadAdapter(self, request: Any, context: Any) -> Any:
        self.asked.append(request.revision)
        try:
            for part in self.parts:
                if isinstance(part, Exception):
                    raise part
                yield adapter_pb2.ReadAdapterResponse(chunk=part[0], size_bytes=part[1])
            await asyncio.sleep(self.stall_s)
        finally:
            self.ended = True


@contextlib.asynccontextmanager
async def controller(scripted: Scripted) -> AsyncIterator[ControllerSource]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(scripted, server)
    address = bind(server, "127.0.0.1:0", None)
    await server.start()
    try:
        async with dial(address) as channel:
            yield ControllerSource(channel)
    finally:
        await server.stop(None)


def from_controller(*parts: tuple[bytes, int] | Exception, stall_s: float = 0.0) -> Any:
    async def run() -> Any:
        scripted = Scripted(parts, stall_s)
        async with controller(scripted) as source:
            try:
                return await source.fetch(A, 100)
            finally:
                assert scripted.asked == [A]
                for _ in range(200):  # the call is not left open
                    if scripted.ended:
                        break
                    await asyncio.sleep(0.01)
                assert scripted.ended

    return asyncio.run(run())


def test_the_controller_sends_a_blob_in_parts() -> None:
    assert from_controller((b"a" * 60, 100), (b"a" * 40, 0)) == blob("a")
    assert from_controller((b"", 0)) == b""


def test_a_blob_from_the_controller_is_held_once() -> None:
    size, part = 32 << 20, 1 << 20
    parts: list[tuple[bytes, int] | Exception] = [(bytes(part), size)] * (size // part)

    async def run() -> int:
        async with controller(Scripted(parts, 0.0)) as source:
            tracemalloc.start()
            try:
                blob = await source.fetch(A, size)
                assert isinstance(blob, bytes | bytearray)
                assert len(blob) == size
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    assert asyncio.run(run()) < 1.6 * size


@pytest.mark.parametrize(
    ("parts", "kind", "words"),
    [
        ([], UnavailableError, "controller: ended without a word"),
        ([(b"a" * 60, 100)], UnavailableError, "ended after 60 of 100 bytes"),
        ([(b"a" * 60, 100), (b"a" * 41, 0)], InvalidCheckpointError, "more than the 100 bytes"),
        ([(b"a", 101)], ResourceExhaustedError, "101 bytes, over the 100 expected"),
        ([(b"a" * 101, 100)], InvalidCheckpointError, "more than the 100 bytes"),
        ([NotFoundError("revision", "is not here")], NotFoundError, "is not here"),
        ([(b"a", 100), UnavailableError("store", "broke")], UnavailableError, "store: broke"),
        ([PermissionDeniedError("authorization", "no")], PermissionDeniedError, "no"),
    ],
)
def test_a_controller_that_sends_the_wrong_thing(
    parts: list[Any], kind: type[LoraServeError], words: str
) -> None:
    with pytest.raises(LoraServeError, match=words) as caught:
        from_controller(*parts)
    assert type(caught.value) is kind


@pytest.mark.parametrize("parts", [[], [(b"a" * 60, 100)]])
def test_a_controller_that_stalls_is_given_up(
    parts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "STALL_S", 0.5)
    begin = time.monotonic()
    with pytest.raises(UnavailableError, match=r"controller: sent nothing for 0.5 s"):
        from_controller(*parts, stall_s=30)
    assert time.monotonic() - begin < 5


def test_a_controller_that_is_not_there_is_unavailable() -> None:
    async def run() -> None:
        async with dial("127.0.0.1:1") as channel:
            await AdapterFetch([ControllerSource(channel)], LIMIT, read_fake).fetch(spec("s", "a"))

    with pytest.raises(UnavailableError):
        asyncio.run(run())
