"""ReadCopy over HTTP/2 by hand: against gRPC's own server, and against peers that do not speak it
as gRPC does."""

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import certificate
from node_calls import run
from peer_fixtures import BLOB, HEADER, Reader, holding

from loraserve.errors import LoraServeError, UnavailableError
from loraserve.node.peers import copy_stream, http2
from loraserve.node.peers.copy_stream import CopyStream
from loraserve.node.pool.checked_writer import CheckedWriter
from loraserve.security.tls import (
    TlsFiles,
    channel_credentials,
    client_context,
    server_credentials,
)
from loraserve.v1.node_pb2 import ReadCopyRequest

BEGIN = HEADER.header_bytes
REQUEST = ReadCopyRequest(revision=HEADER.revision, offset_bytes=BEGIN)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def new_writer() -> CheckedWriter:
    slot = Reader().pool.reserve(HEADER.size_bytes)
    slot.view[:BEGIN] = BLOB[:BEGIN]
    return CheckedWriter(slot, HEADER, "xxh3")


def read(address: str, tls: Any = None, metadata: Any = ()) -> bytes:
    writer = new_writer()
    CopyStream(address, tls, metadata, 60.0).read(REQUEST, writer)
    writer.finish()
    return bytes(writer.view)


def failure(address: str, tls: Any = None) -> str:
    with pytest.raises(UnavailableError) as caught:
        read(address, tls)
    return str(caught.value)


# A server that says what it is told to


class Peer:
    """What the reader sends, frame by frame, and what it is sent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.sent = connection.makefile("rb")

    def frame(self) -> tuple[int, int, int, bytes]:
        """Type, flags, stream and body of the next frame."""
        head = self.sent.read(9)
        body = self.sent.read(int.from_bytes(head[:3], "big"))
        return head[3], head[4], int.from_bytes(head[5:], "big"), body

    def say(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        head = len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
        self._connection.sendall(head + body)

    def raw(self, data: bytes) -> None:
        self._connection.sendall(data)

    def message(self, chunk: bytes, flags: int = 0) -> None:
        body = bytes((1 << 3 | 2,)) + varint(len(chunk)) + chunk
        self.say(0, flags, 1, struct.pack(">BI", 0, len(body)) + body)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes((value & 127 | 128,)), value >> 7
    return out + bytes((value,))


Script = Callable[[Peer], None]


@contextlib.contextmanager
def scripted(script: Script) -> Iterator[str]:
    """One connection; `script` has it after the request."""
    failures: list[BaseException] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                peer = Peer(connection)
                assert peer.sent.read(len(PREFACE)) == PREFACE
                kinds = [peer.frame()[0] for _ in range(4)]
                assert kinds == [4, 8, 1, 0]
                script(peer)
            except (BrokenPipeError, ConnectionResetError):
                pass
            except BaseException as error:
                failures.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join(60)
    assert not failures


DATA = BLOB[BEGIN:]


def pieces(peer: Peer) -> None:
    for at in range(0, len(DATA), 1 << 20):
        peer.message(DATA[at : at + (1 << 20)])


def test_frames_of_the_connection_come_between_and_are_answered() -> None:
    def script(peer: Peer) -> None:
        peer.say(4, 0, 0, struct.pack(">HI", 3, 100))
        peer.say(6, 0, 0, b"12345678")
        peer.say(8, 0, 0, struct.pack(">I", 1000))
        peer.say(1, 4, 1, b"\x88")  # :status 200
        peer.say(4, 1, 0, b"")  # the answer to the reader's settings
        peer.say(99, 7, 3, b"of a later version")
        assert peer.frame() == (4, 1, 0, b"")
        assert peer.frame() == (6, 1, 0, b"12345678")
        pieces(peer)

    with scripted(script) as address:
        assert read(address) == BLOB


def test_frames_end_where_they_like() -> None:
    """In the middle of a message's head, of a varint, of a chunk; and some are empty."""

    def script(peer: Peer) -> None:
        body = bytes((1 << 3 | 2,)) + varint(len(DATA)) + DATA
        whole = struct.pack(">BI", 0, len(body)) + body
        for begin, end in ((0, 3), (3, 3), (3, 6), (6, 8), (8, 1000), (1000, len(whole))):
            peer.say(0, 0, 1, whole[begin:end])

    with scripted(script) as address:
        assert read(address) == BLOB


def cut_short(peer: Peer) -> None:
    peer.message(DATA[:1000])
    trailers(peer)


def wait(peer: Peer) -> None:
    peer.sent.read(1)


def trailers(peer: Peer) -> None:
    peer.say(1, 5, 1, b"\x88")


BROKEN: dict[str, Script] = {
    "closed at once": lambda peer: None,
    "refused": trailers,
    "a reset": lambda peer: peer.say(3, 0, 1, struct.pack(">I", 8)),
    "goaway": lambda peer: peer.say(7, 0, 0, bytes(8)),
    "padded data": lambda peer: peer.say(0, 8, 1, b"\x05" + DATA[:10]),
    "data of another stream": lambda peer: peer.say(0, 0, 3, DATA[:10]),
    "a control frame of 16 MB": lambda peer: peer.raw(b"\xff\xff\xff\x04\x00" + bytes(4)),
    "HTTP/1.1": lambda peer: peer.raw(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10),
    "random bytes": lambda peer: peer.raw(bytes(range(256))),
    "half a frame": lambda peer: peer.raw(b"\x00\x10\x00\x00"),
    "a compressed message": lambda peer: peer.say(0, 0, 1, b"\x01" + struct.pack(">I", 9)),
    "a message of 4 GB": lambda peer: peer.say(0, 0, 1, b"\x00\xff\xff\xff\xff"),
    "a varint without end": lambda peer: peer.say(0, 0, 1, b"\x00\x00\x00\x00\x20" + b"\xff" * 32),
    "a chunk over its message": lambda peer: peer.say(0, 0, 1, b"\x00\x00\x00\x00\x05\x0a\x10abc"),
    "a group": lambda peer: peer.say(0, 0, 1, b"\x00\x00\x00\x00\x02\x0b\x01"),
    "an end in the middle": lambda peer: peer.message(DATA[:1000], flags=1),
    "trailers in the middle": lambda peer: cut_short(peer),
    "nothing": lambda peer: wait(peer),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_answer_is_unavailable(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_stream, "STALL_S", 0.5)
    with scripted(BROKEN[what]) as address:
        failure(address)


def test_bytes_are_counted_before_their_chunk_is_whole() -> None:
    def script(peer: Peer) -> None:
        peer.message(b"")
        peer.message(DATA[:1000])
        peer.sent.read(1)  # until the reader goes

    with scripted(script) as address:
        stream, writer = CopyStream(address, None, (), 60.0), new_writer()

        def reading() -> None:
            with contextlib.suppress(LoraServeError):
                stream.read(REQUEST, writer)

        thread = threading.Thread(target=reading)
        thread.start()
        end = time.monotonic() + 60
        while stream.received < 1000:
            assert time.monotonic() < end
            time.sleep(0.005)
        assert stream.received == 1000
        stream.close()
        thread.join()


def test_a_read_that_is_closed_ends_at_once_and_writes_no_more() -> None:
    begun = threading.Event()

    def script(peer: Peer) -> None:
        peer.message(DATA[:1000])
        begun.set()
        peer.sent.read(1)  # until the reader goes

    with scripted(script) as address:
        stream, writer = CopyStream(address, None, (), 60.0), new_writer()
        caught: list[LoraServeError] = []

        def reading() -> None:
            try:
                stream.read(REQUEST, writer)
            except LoraServeError as error:
                caught.append(error)

        thread = threading.Thread(target=reading)
        thread.start()
        assert begun.wait(60)
        assert stream.close()
        thread.join(60)
        assert isinstance(caught[0], UnavailableError)


def test_a_stream_that_was_closed_before_it_connected_reads_nothing() -> None:
    with scripted_never() as address:
        stream, writer = CopyStream(address, None, (), 60.0), new_writer()
        assert not stream.close()
        with pytest.raises(UnavailableError):
            stream.read(REQUEST, writer)


@contextlib.contextmanager
def scripted_never() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


# gRPC's own server


def test_more_than_a_window_is_read_from_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(http2, "_MAX_WINDOW", (1 << 16) + 1000)
        monkeypatch.setattr(http2, "_RENEW_BYTES", 1 << 15)
        async with holding() as holder:
            holder.put(HEADER.revision, BLOB)
            assert await Reader().read(holder.peer) == BLOB

    run(test)


def tls_files(directory: Path) -> tuple[TlsFiles, TlsFiles]:
    """Of a server and of its clients, each of whom wants to see the other's."""
    certificate(directory, "ca", "", None)
    server = certificate(directory, "server", "IP:127.0.0.1", "ca")
    return server, certificate(directory, "client", "DNS:client", "ca")


def test_over_tls_with_certificates_of_both_ends(tmp_path: Path) -> None:
    server, client = tls_files(tmp_path)

    async def test() -> None:
        async with holding(credentials=server_credentials(server)) as holder:
            holder.put(HEADER.revision, BLOB)
            reader = Reader(credentials=channel_credentials(client), tls=client_context(client))
            assert await reader.read(holder.peer) == BLOB
            await reader.source.close()

    run(test)


def test_a_server_that_no_authority_vouches_for_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    server, _ = tls_files(tmp_path / "a")
    _, stranger = tls_files(tmp_path / "b")

    async def test() -> None:
        async with holding(credentials=server_credentials(server)) as holder:
            holder.put(HEADER.revision, BLOB)
            address = holder.peer.address
            for tls in (client_context(stranger), None):
                await asyncio.to_thread(failure, address, tls)

    run(test)


def test_long_keys_are_encoded() -> None:
    """HPACK's lengths have a prefix of seven bits."""
    for length in (1, 126, 127, 128, 254, 255, 256, 300, 5000):
        raw = http2._string("k" * length)
        value, at, shift = raw[0] & 127, 1, 0
        if value == 127:
            while True:
                value += (raw[at] & 127) << shift
                at, shift = at + 1, shift + 7
                if raw[at - 1] < 128:
                    break
        assert value == length == len(raw) - at
