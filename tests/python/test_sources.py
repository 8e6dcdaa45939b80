"""Where a node's adapters come from: the durable store and the controller, as they should be and
as they should not."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import grpc.aio
import pytest
from fake_node import blob, load_of, revision, until
from pool_fixtures import fetch_into_pool, fetched, flipped, header_of, large, put
from pool_fixtures import load_of as large_load

from loraserve.checkpoint.durable_store import READ_BYTES, DurableStore
from loraserve.errors import (
    InvalidArgumentError,
    InvalidCheckpointError,
    LoraServeError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from loraserve.node import fetch as fetch_module
from loraserve.node import sources
from loraserve.node.sources import ControllerSource, StoreSource
from loraserve.v1 import adapter_pb2, adapter_pb2_grpc
from loraserve.wire import SERVER_OPTIONS, bind, dial
from loraserve.wire_errors import typed_errors

DATA = large()
HEADER = header_of(DATA)
LOAD = large_load(DATA)


# The durable store


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[DurableStore]:
    """Not a directory: a file system of fsspec."""
    store = DurableStore("memory://adapters")
    (tmp_path / "blob").write_bytes(DATA)
    store.put(HEADER.revision, tmp_path / "blob")
    yield store
    fsspec.filesystem("memory").rm("/adapters", recursive=True)


def test_adapters_come_from_a_directory_or_a_url(tmp_path: Path, remote: DurableStore) -> None:
    local = DurableStore(str(tmp_path / "store"))
    put(local, DATA)
    for store in (local, remote):
        assert fetched(LOAD, StoreSource(store)) == (DATA, "store")


def test_a_range_of_a_blob_is_no_more_than_that(tmp_path: Path, remote: DurableStore) -> None:
    local = DurableStore(str(tmp_path / "store"))
    put(local, DATA)
    for store in (local, remote):
        assert store.read_range(HEADER.revision, 100, 50) == DATA[100:150]
        assert store.read_range(HEADER.revision, len(DATA) - 5, 50) == DATA[-5:]
        with pytest.raises(NotFoundError):
            store.read_range("ab" * 32, 0, 1)


def test_a_small_adapter_takes_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DurableStore(str(tmp_path))
    folder = Path(store.path_of(revision("a")))
    folder.parent.mkdir()
    folder.write_bytes(blob("a"))
    monkeypatch.setattr(store, "read", None)
    assert fetched(load_of("sql", "a"), StoreSource(store)) == (blob("a"), "store")


def test_a_header_longer_than_the_first_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DurableStore(str(tmp_path))
    put(store, DATA)
    for start_bytes in (1, 15, 16, 100, HEADER.header_bytes - 1):
        monkeypatch.setattr(sources, "START_BYTES", start_bytes)
        if start_bytes < 16:  # shorter than what tells the header's length
            with pytest.raises(InvalidCheckpointError):
                fetched(LOAD, StoreSource(store))
        else:
            assert fetched(LOAD, StoreSource(store)) == (DATA, "store")


def test_a_store_without_the_blob(tmp_path: Path, remote: DurableStore) -> None:
    for store in (DurableStore(str(tmp_path / "store")), remote):
        with pytest.raises(NotFoundError, match="is not in the store"):
            fetched(load_of("sql", "b"), StoreSource(store))


@pytest.mark.parametrize("end", [0, 7, 20, HEADER.header_bytes, 2_000_000, len(DATA) - 1])
def test_a_blob_that_was_cut_short_is_refused(tmp_path: Path, end: int) -> None:
    store = DurableStore(str(tmp_path))
    put(store, DATA, DATA[:end])
    with pytest.raises(InvalidCheckpointError):
        fetched(LOAD, StoreSource(store))


@pytest.mark.parametrize("at", [0, 9, 100, HEADER.header_bytes, 1_500_000, len(DATA) - 1])
def test_a_flipped_bit_is_refused(tmp_path: Path, at: int) -> None:
    store = DurableStore(str(tmp_path))
    put(store, DATA, flipped(DATA, at))
    with pytest.raises(InvalidArgumentError):  # another format version is unsupported
        fetched(LOAD, StoreSource(store))


def test_a_blob_that_goes_on_is_refused_at_once(tmp_path: Path) -> None:
    store = DurableStore(str(tmp_path))
    blocks = 0

    def endless(revision: str, offset: int = 0) -> Iterator[bytes]:
        nonlocal blocks
        yield DATA[offset:]
        while True:
            blocks += 1
            yield bytes(READ_BYTES)

    put(store, DATA)
    store.read = endless  # type: ignore[method-assign, assignment]
    with pytest.raises(InvalidCheckpointError, match=f"more than the {len(DATA)} bytes"):
        fetched(LOAD, StoreSource(store))
    assert blocks == 1


def test_another_adapter_under_the_revision_is_refused(tmp_path: Path) -> None:
    store = DurableStore(str(tmp_path))
    put(store, DATA, large(2))
    with pytest.raises(InvalidCheckpointError, match="revision: the header is not that of"):
        fetched(LOAD, StoreSource(store))


def test_a_store_that_fails_is_unavailable(tmp_path: Path) -> None:
    store = DurableStore(str(tmp_path))
    put(store, DATA)

    def broken(*_: object) -> Any:
        raise OSError(5, "Input/output error")

    for method in ("read_range", "read"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, method, broken)
            with pytest.raises(UnavailableError, match=r"store: .*Input/output error"):
                fetched(LOAD, StoreSource(store))


def test_a_path_that_is_no_file_is_an_error_like_any_other(tmp_path: Path) -> None:
    store = DurableStore(str(tmp_path))
    put(store, DATA).unlink()
    Path(store.path_of(HEADER.revision)).mkdir()
    with pytest.raises(LoraServeError):
        fetched(LOAD, StoreSource(store))


class Hanging:
    """A store's method that returns when it is told to, and what calls it in the meantime."""

    def __init__(self) -> None:
        self.may_return = threading.Event()
        self.calls = 0

    def __call__(self, *_: object) -> Any:
        self.calls += 1
        self.may_return.wait(300)
        return iter([DATA[HEADER.header_bytes :]])


@pytest.mark.parametrize("method", ["read_range", "read"])
def test_a_store_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    store = DurableStore(str(tmp_path))
    put(store, DATA)
    hanging = Hanging()
    monkeypatch.setattr(store, method, hanging)
    monkeypatch.setattr(fetch_module, "FETCH_GRACE_S", 0.1)
    begin = time.monotonic()
    try:
        with pytest.raises(UnavailableError, match=r"store: took over 0.1 s"):
            fetched(LOAD, StoreSource(store), min_bytes_per_s=1e12)
        # The loop has been closed, as at the end of a process: nothing waited for the thread.
        assert time.monotonic() - begin < 60
    finally:
        hanging.may_return.set()


def test_reads_that_hang_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DurableStore(str(tmp_path))
    hanging = Hanging()
    monkeypatch.setattr(store, "read_range", hanging)
    monkeypatch.setattr(sources, "_MAX_STORE_CALLS", 3)

    async def run() -> None:
        source = StoreSource(store)
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(source.read_start(LOAD), 0.05)
        with pytest.raises(UnavailableError, match="store: 3 calls have not returned"):
            await source.read_start(LOAD)
        await until(lambda: hanging.calls == 3, "all have come there")
        monkeypatch.undo()
        put(store, DATA)
        hanging.may_return.set()
        await until(lambda: source._calls.running == 0, "returned")
        assert (await source.read_start(LOAD))[:8] == b"LORAPACK"

    asyncio.run(run())


def test_what_killed_writers_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    store = DurableStore(str(tmp_path / "store"))
    blob_path = put(store, DATA)
    old, new = (blob_path.with_name(f"{blob_path.name}.{word}.part") for word in ("aa", "bb"))
    for path in (old, new, blob_path):
        path.write_bytes(b"x")
    for path in (old, blob_path):
        os.utime(path, (time.time() - 90_000,) * 2)
    store.remove_staged()
    assert sorted(blob_path.parent.iterdir()) == [blob_path, new]


# The controller


class Scripted(adapter_pb2_grpc.AdapterServiceServicer):
    """Answers the first call with the first of `scripts`, and so on; then waits for `stall_s`."""

    def __init__(self, scripts: Iterable[list[Any]], stall_s: float) -> None:
        self.scripts = iter(scripts)
        self.stall_s = stall_s
        self.asked: list[Any] = []
        self.ended = 0

    @typed_errors
    async def ReadAdapter(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        try:
            for part in next(self.scripts):
                if isinstance(part, Exception):
                    raise part
                yield adapter_pb2.ReadAdapterResponse(chunk=part[0], size_bytes=part[1])
            await asyncio.sleep(self.stall_s)
        finally:
            self.ended += 1


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


def parts_of(data: bytes, size: int = 1 << 20) -> list[tuple[bytes, int]]:
    return [(data[at : at + size], len(data) if at == 0 else 0) for at in range(0, len(data), size)]


def from_controller(
    start: list[Any], rest: list[Any], stall_s: float = 0.0, **options: Any
) -> tuple[bytes, str]:
    """What comes of it where the controller answers the call for the header with `start`, and that
    for the data with `rest`."""

    async def run() -> tuple[bytes, str]:
        scripted = Scripted([start, rest], stall_s)
        async with controller(scripted) as source:
            try:
                fetch = fetch_module.AdapterFetch([source], max_bytes=1 << 30, **options)
                return await fetch_into_pool(LOAD, fetch)
            finally:
                assert {request.revision for request in scripted.asked} == {HEADER.revision}
                # No call is left open.
                await until(lambda: scripted.ended == len(scripted.asked), "ended")

    return asyncio.run(run())


HEAD, TAIL = parts_of(DATA)[:1], parts_of(DATA[HEADER.header_bytes :])


def test_the_controller_sends_an_adapter_in_parts() -> None:
    assert from_controller(HEAD, TAIL) == (DATA, "controller")
    drops = parts_of(DATA[: HEADER.header_bytes + 5], 7)
    assert from_controller(drops, parts_of(DATA[HEADER.header_bytes :], 99_991)) == (
        DATA,
        "controller",
    )


@pytest.mark.parametrize(
    ("start", "rest", "kind", "words"),
    [
        ([], [], UnavailableError, "controller: ended after 0 bytes"),
        ([(DATA[:50], 9)], [], UnavailableError, "controller: ended after 50 bytes"),
        ([(b"x" * 50, 9)], [], InvalidCheckpointError, "magic"),
        (HEAD, [], UnavailableError, f"ended after {HEADER.header_bytes} of {len(DATA)} bytes"),
        (HEAD, TAIL[:2], UnavailableError, f"ended after .* of {len(DATA)} bytes"),
        (HEAD, [*TAIL[:2], (TAIL[2][0] + b"x", 0)], InvalidCheckpointError, "more than the"),
        (HEAD, [TAIL[0], TAIL[0]], InvalidCheckpointError, "chunk 1: does not have its xxh3 sum"),
        (HEAD, [NotFoundError("revision", "is not here")], NotFoundError, "is not here"),
        (HEAD, [TAIL[0], UnavailableError("store", "broke")], UnavailableError, "store: broke"),
        ([PermissionDeniedError("authorization", "no")], [], PermissionDeniedError, "no"),
    ],
)
def test_a_controller_that_sends_the_wrong_thing(
    start: list[Any], rest: list[Any], kind: type[LoraServeError], words: str
) -> None:
    with pytest.raises(LoraServeError, match=words) as caught:
        from_controller(start, rest)
    assert type(caught.value) is kind


@pytest.mark.parametrize(("start", "rest"), [([], []), (HEAD, []), (HEAD, TAIL[:1])])
def test_a_controller_that_stalls_is_given_up(
    start: list[Any], rest: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "FETCH_GRACE_S", 1.0)
    begin = time.monotonic()
    with pytest.raises(UnavailableError, match=r"controller: took over 1.0 s"):
        from_controller(start, rest, stall_s=3600, min_bytes_per_s=1e12)
    assert time.monotonic() - begin < 60


def test_a_controller_that_is_not_there_is_unavailable() -> None:
    async def run() -> None:
        async with dial("127.0.0.1:1") as channel:
            fetch = fetch_module.AdapterFetch([ControllerSource(channel)], max_bytes=1 << 30)
            await fetch.start(LOAD)

    with pytest.raises(UnavailableError):
        asyncio.run(run())
