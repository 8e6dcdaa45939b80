"""PeerSource against holders that give the copy, lie, hang, vanish and start again."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_node import until
from node_calls import run
from peer_fixtures import (
    BEGIN,
    BLOB,
    REVISION,
    Reader,
    failure,
    flipped,
    holding,
    released,
)

from loraserve.errors import (
    InvalidCheckpointError,
    LoraServeError,
    NotFoundError,
    UnavailableError,
)
from loraserve.node.load_info import Peer
from loraserve.node.peers import copy_stream
from loraserve.node.peers import source as source_module
from loraserve.node.peers.copy_messages import encode
from loraserve.v1 import node_pb2
from loraserve.wire import SERVER_OPTIONS, bind

# Holders that do as they should


def test_a_copy_comes_as_a_stream_and_every_byte_of_it() -> None:
    async def test() -> None:
        async with holding() as holder:
            holder.put(REVISION, BLOB)
            reader = Reader()
            assert await reader.read(holder.peer) == BLOB
            assert await reader.read(holder.peer) == BLOB
            assert reader.reads == [("grpc", len(BLOB))] * 2
            await until(released(holder), "the leases are back")

    run(test)


def test_a_holder_without_the_copy_is_not_found_and_the_node_asks_not_itself() -> None:
    async def test() -> None:
        async with holding() as holder:
            reader = Reader()
            assert isinstance(await failure(reader, holder.peer), NotFoundError)
            assert isinstance(await failure(reader), NotFoundError)
            myself = Peer("reader", holder.peer.address)
            holder.put(REVISION, BLOB)
            assert isinstance(await failure(reader, myself), NotFoundError)
            assert reader.reads == []

    run(test)


def test_nobody_at_the_address_is_unavailable() -> None:
    async def test() -> None:
        async with holding() as holder:
            peer = holder.peer
        assert isinstance(await failure(Reader(), peer), UnavailableError)

    run(test)


def test_a_holder_that_was_started_again_at_its_address_is_read() -> None:
    async def test() -> None:
        reader = Reader()
        async with holding() as holder:
            holder.put(REVISION, BLOB)
            assert await reader.read(holder.peer) == BLOB
            address = holder.peer.address
        assert isinstance(await failure(reader, holder.peer), UnavailableError)
        async with holding(address=address) as again:
            again.put(REVISION, BLOB)
            assert await reader.read(again.peer) == BLOB

    run(test)


def test_a_channel_is_closed_when_nobody_has_read_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        async with holding() as holder:
            holder.put(REVISION, BLOB)
            reader = Reader()
            monkeypatch.setattr(reader.channels, "IDLE_S", 0.01)
            await reader.read(holder.peer)
            await until(lambda: not reader.channels._open, "closed")
            assert await reader.read(holder.peer) == BLOB
            await reader.source.close()
            assert not reader.channels._open

    run(test)


# Holders that do not


Stream = Callable[[], Iterator[bytes]]


@contextlib.asynccontextmanager
async def lying(
    stream: Stream, then: Callable[[Any], Any] | None = None, leased: int = len(BLOB)
) -> AsyncIterator[Peer]:
    """A holder whose ReadCopy sends these messages, then does as `then` says."""

    async def read_copy(request: Any, context: Any) -> None:
        for message in stream():
            await context.write(message)
        if then is not None:
            await then(context)

    async def lease_copy(request: Any, context: Any) -> Any:
        return node_pb2.LeaseCopyResponse(lease_id=1, size_bytes=leased)

    handlers: Any = {
        "ReadCopy": grpc.unary_stream_rpc_method_handler(read_copy, None, None),
        "LeaseCopy": grpc.unary_unary_rpc_method_handler(
            lease_copy, None, node_pb2.LeaseCopyResponse.SerializeToString
        ),
    }
    server = grpc.aio.server(options=SERVER_OPTIONS)
    service = grpc.method_handlers_generic_handler("loraserve.v1.PeerService", handlers)
    server.add_generic_rpc_handlers((service,))
    address = bind(server, "127.0.0.1:0", None)
    await server.start()
    try:
        yield Peer("liar", address)
    finally:
        await server.stop(0)


def chunks(data: bytes, size: int | None = len(BLOB)) -> Iterator[bytes]:
    for at in range(0, len(data), 1 << 20):
        yield encode(memoryview(data)[at : at + (1 << 20)], None if at else size)


LIES: dict[str, tuple[Stream, type[LoraServeError]]] = {
    "a bit in the first chunk": (lambda: chunks(flipped(5)), InvalidCheckpointError),
    "a bit in the last chunk": (lambda: chunks(flipped(-1)), InvalidCheckpointError),
    "the bytes of another": (lambda: chunks(bytes(len(BLOB) - BEGIN)), InvalidCheckpointError),
    "too few bytes": (lambda: chunks(BLOB[BEGIN:-1]), UnavailableError),
    "no bytes": (lambda: iter(()), UnavailableError),
    "too many bytes": (lambda: chunks(BLOB[BEGIN:] + b"x"), InvalidCheckpointError),
    "another size": (lambda: chunks(BLOB[BEGIN:], 7), InvalidCheckpointError),
    "no message of ours": (lambda: iter([b"\xff" * 100]), UnavailableError),
    "a message that ends early": (lambda: iter([b"\x0a\xff\x7fab"]), UnavailableError),
    "messages of nothing": (lambda: endless(b""), UnavailableError),
    "a message that is too long": (lambda: iter([bytes(5 << 20)]), UnavailableError),
}


def endless(data: bytes) -> Iterator[bytes]:
    while True:
        yield encode(memoryview(data))


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_a_typed_error(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        stream, kind = LIES[lie]
        async with lying(stream) as peer, holding() as holder:
            reader = Reader(deadline_s=60.0)
            with monkeypatch.context() as patch:
                if lie == "messages of nothing":
                    shorten_stalls(patch)
                assert type(await failure(reader, peer)) is kind
            holder.put(REVISION, BLOB)
            assert await reader.read(holder.peer) == BLOB

    run(test)


def test_a_lie_about_the_size_is_found_before_a_byte_is_read() -> None:
    async def test() -> None:
        async with lying(lambda: chunks(BLOB[BEGIN:]), leased=5) as peer:
            assert isinstance(await failure(Reader(), peer), InvalidCheckpointError)

    run(test)


def test_an_error_in_the_middle_or_before_the_first_byte_ends_the_attempt() -> None:
    async def test() -> None:
        async def abort(context: Any) -> None:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "reads")

        for sent in (100, 0):
            async with lying(lambda: chunks(BLOB[BEGIN : BEGIN + sent]), abort) as peer:  # noqa: B023
                assert isinstance(await failure(Reader(), peer), UnavailableError)

    run(test)


def test_bytes_after_the_last_one_are_of_no_account() -> None:
    async def test() -> None:
        def stream() -> Iterator[bytes]:
            yield from chunks(BLOB[BEGIN:])
            yield from endless(bytes(1000))

        async with lying(stream) as peer:
            assert await Reader().read(peer) == BLOB

    run(test)


async def hang(context: Any) -> None:
    await asyncio.Event().wait()


def shorten_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (source_module, copy_stream):
        monkeypatch.setattr(module, "STALL_S", 0.2)


def test_a_holder_that_sends_nothing_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        shorten_stalls(monkeypatch)
        async with lying(lambda: chunks(BLOB[BEGIN : BEGIN + 100]), hang) as peer:
            reader = Reader()
            error = await failure(reader, peer)
            assert isinstance(error, UnavailableError)
            assert "nothing" in str(error)
            await until(lambda: reader.source._streams.running == 0, "the thread has ended")

    run(test)


def test_a_holder_that_sends_slowly_has_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chunk may take longer than a stall."""

    class Slow:
        def __init__(self) -> None:
            self.ended, self._received = threading.Event(), 0

        @property
        def received(self) -> int:
            self._received += 1  # a byte since somebody looked last
            return self._received

        def read(self, *_: Any) -> None:
            self.ended.wait()
            raise UnavailableError("peer", "is closed")

        def close(self) -> bool:
            self.ended.set()
            return True

    async def test() -> None:
        shorten_stalls(monkeypatch)
        async with holding() as holder:
            holder.put(REVISION, BLOB)
            reader = Reader(deadline_s=1.0)
            monkeypatch.setattr(reader.channels, "stream", lambda *_: Slow())
            assert "took over" in str(await failure(reader, holder.peer))

    run(test)


def test_a_holder_is_given_up_at_the_deadline() -> None:
    async def test() -> None:
        async with lying(lambda: iter(()), hang) as peer:
            error = await failure(Reader(deadline_s=0.2), peer)
            assert isinstance(error, UnavailableError)
            assert "took over" in str(error)

    run(test)


def test_a_read_that_is_cancelled_lets_go_of_the_holder() -> None:
    async def test() -> None:
        async with lying(lambda: chunks(BLOB[BEGIN : BEGIN + 100]), hang) as peer:
            reader = Reader()
            reading = asyncio.create_task(reader.read(peer))
            await until(lambda: reader.source._streams.running == 1, "reading")
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await until(lambda: reader.source._streams.running == 0, "the thread has ended")

    run(test)
