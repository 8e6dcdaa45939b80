"""ReadCopy straight into a slot: one call on a connection of its own."""

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Sequence

from loraserve.checkpoint.packed_header import CHUNK_BYTES
from loraserve.errors import InvalidCheckpointError, UnavailableError
from loraserve.node.peers.http2 import Http2Stream
from loraserve.node.pool.checked_writer import CheckedWriter
from loraserve.v1 import node_pb2
from loraserve.wire import MAX_MESSAGE_BYTES, split_address

# A peer that sends nothing for so long is given up, though its connection stands.
STALL_S = 4.0
_READ_COPY = "/loraserve.v1.PeerService/ReadCopy"
_CHUNK_TAG, _SIZE_TAG = 1 << 3 | 2, 2 << 3 | 0
_VARINT, _BYTES = 0, 2


class CopyStream:
    """`read` blocks, in one thread; `close` may be called from another, and ends it at once."""

    def __init__(
        self,
        address: str,
        tls: ssl.SSLContext | None,
        metadata: Sequence[tuple[str, str]],
        timeout_s: float,
    ) -> None:
        """`timeout_s`: told to the peer; who waits for `read` closes the stream."""
        self._address = address
        self._tls = tls
        self._metadata = tuple(metadata)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._stream: Http2Stream | None = None
        self._closed = False

    @property
    def received(self) -> int:
        """Bytes of the copy that have come, whether their chunk is whole or not. In any thread."""
        stream = self._stream
        return stream.received if stream is not None else 0

    def close(self) -> bool:
        """Whether `read` may still write for a moment: until it raises. If not, it never does."""
        with self._lock:
            self._closed = True
            if self._socket is None:
                return False
            with contextlib.suppress(OSError):
                # Of the socket below TLS, which is not made for two threads.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            return True

    def read(self, request: node_pb2.ReadCopyRequest, writer: CheckedWriter) -> None:
        """Fills what is missing of `writer`. Raises UnavailableError, InvalidCheckpointError."""
        try:
            with self._connected() as connection:
                stream = Http2Stream(connection, self._headers(), _message(request))
                self._stream = stream
                while writer.position < writer.size_bytes:
                    _read_message(stream, writer)
        except OSError as error:
            why = "sends nothing" if isinstance(error, TimeoutError) else error.strerror or error
            raise UnavailableError("peer", f"{self._address}: {why}") from None

    def _connected(self) -> socket.socket:
        host, port = split_address(self._address)
        connection = socket.create_connection((host, port), STALL_S)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if self._closed:
                    raise UnavailableError("peer", "is not read any more")
                if self._tls is not None:
                    connection = self._tls.wrap_socket(
                        connection, server_hostname=host, do_handshake_on_connect=False
                    )
                self._socket = connection
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            return connection
        except BaseException:
            connection.close()
            raise

    def _headers(self) -> list[tuple[str, str]]:
        return [
            (":method", "POST"),
            (":scheme", "https" if self._tls else "http"),
            (":path", _READ_COPY),
            (":authority", self._address),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "loraserve-node"),
            ("grpc-timeout", f"{max(1, round(1000 * self._timeout_s))}m"),
            *self._metadata,
        ]


def _message(request: node_pb2.ReadCopyRequest) -> bytes:
    """As gRPC frames it: not compressed, its length, itself."""
    body = request.SerializeToString()
    return struct.pack(">BI", 0, len(body)) + body


def _read_message(stream: Http2Stream, writer: CheckedWriter) -> None:
    """One ReadCopyResponse, whose chunk goes to where it belongs."""
    compressed, left = struct.unpack(">BI", stream.take(5))
    if compressed or left > MAX_MESSAGE_BYTES:
        raise UnavailableError("peer", "sent a message that is no ReadCopyResponse")
    while left:
        tag, took = _varint(stream)
        value, more = _varint(stream)  # every field of it begins so
        left -= took + more
        length = value if tag & 7 == _BYTES else 0
        if tag & 7 not in (_VARINT, _BYTES) or left < length:
            raise UnavailableError("peer", "sent a message that is no ReadCopyResponse")
        left -= length
        if tag == _CHUNK_TAG:
            begin = writer.position
            if begin + length > writer.size_bytes:
                raise InvalidCheckpointError(
                    "size_bytes", f"more than the {writer.size_bytes} bytes of the header"
                )
            for at in range(begin, begin + length, CHUNK_BYTES):
                end = min(at + CHUNK_BYTES, begin + length)
                stream.fill(writer.view[at:end])
                writer.arrived(end - at)
        elif tag == _SIZE_TAG and value != writer.size_bytes:
            raise InvalidCheckpointError(
                "size_bytes", f"{value} at the peer, not {writer.size_bytes}"
            )
        elif length:  # of a later version
            stream.take(length)


def _varint(stream: Http2Stream) -> tuple[int, int]:
    """A varint of protobuf, and the bytes it has."""
    value = 0
    for i in range(10):
        byte = stream.take(1)[0]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value & (1 << 64) - 1, i + 1
    raise UnavailableError("peer", "sent a message that is no ReadCopyResponse")
