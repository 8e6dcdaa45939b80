"""The client's side of one HTTP/2 stream, as far as reading a gRPC call's messages into memory that
is there already takes it.

grpcio hands a message over as bytes that it has copied three times by then, which is what a read of
a large adapter costs most. Here the kernel writes into the slot itself. The server is gRPC's own,
and knows no difference. What is not plain data (a refusal, a reset, a strange frame) is an error
here; calls that need their status go through grpcio.
"""

import socket
import struct
from collections.abc import Iterable

from loraserve.errors import UnavailableError

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 1, 1, 4, 8
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 2, 4, 5
_FRAME_HEAD_BYTES = 9
_STREAM = 1
_MAX_WINDOW = (1 << 31) - 1
_DEFAULT_WINDOW = (1 << 16) - 1
# The server is told to go on when it has sent so much.
_RENEW_BYTES = 1 << 28
_MAX_FRAME = (1 << 24) - 1
# Of a frame that is no data: none that gRPC sends is as long.
_MAX_CONTROL_BYTES = 1 << 16


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


def _string(value: str) -> bytes:
    """HPACK: a string as it is, its length in an integer of a seven-bit prefix."""
    raw = value.encode("ascii")
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    rest, length = len(raw) - 127, bytearray((127,))
    while rest > 127:
        length.append(rest & 127 | 128)
        rest >>= 7
    return bytes((*length, rest)) + raw


def _header_block(headers: Iterable[tuple[str, str]]) -> bytes:
    """HPACK: literals that nobody between may keep in a table (keys are among them)."""
    return b"".join(b"\x10" + _string(name) + _string(value) for name, value in headers)


class Http2Stream:
    """A call's request goes out when it is made; then `fill` gives what comes back, in order. Not
    thread-safe. Raises UnavailableError and OSError."""

    def __init__(
        self, connection: socket.socket, headers: Iterable[tuple[str, str]], body: bytes
    ) -> None:
        """`connection`: fresh, and blocking with a timeout. `headers`: pseudo headers first."""
        self._connection = connection
        self._left = 0  # of the data frame that is being read
        self._last = False  # nothing comes after that frame
        self._unrenewed = 0
        self.received = 0
        """Bytes that `fill` has got so far. Another thread may look."""
        settings = struct.pack(
            ">HIHIHIHI",
            *(_HEADER_TABLE_SIZE, 0, _ENABLE_PUSH, 0),
            *(_INITIAL_WINDOW_SIZE, _MAX_WINDOW, _MAX_FRAME_SIZE, _MAX_FRAME),
        )
        connection.sendall(
            _PREFACE
            + _frame(_SETTINGS, 0, 0, settings)
            + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _MAX_WINDOW - _DEFAULT_WINDOW))
            + _frame(_HEADERS, _END_HEADERS, _STREAM, _header_block(headers))
            + _frame(_DATA, _END_STREAM, _STREAM, body)
        )

    def fill(self, view: memoryview, *, counted: bool = True) -> None:
        """The next bytes of the answer. UnavailableError where it ends before `view` is full."""
        while view:
            while not self._left:
                self._next_frame()
            part = view[: self._left]
            self._exact(part, counted=counted)
            self._left -= len(part)
            self._renew(len(part))
            view = view[len(part) :]

    def take(self, length: int) -> bytes:
        """As `fill`; for a few bytes."""
        taken = bytearray(length)
        self.fill(memoryview(taken), counted=False)
        return bytes(taken)

    def _exact(self, view: memoryview, *, counted: bool = False) -> None:
        while view:
            received = self._connection.recv_into(view)
            if not received:
                raise UnavailableError("peer", "closed the connection")
            if counted:
                self.received += received
            view = view[received:]

    def _next_frame(self) -> None:
        if self._last:
            raise UnavailableError("peer", "ended its answer early")
        head = bytearray(_FRAME_HEAD_BYTES)
        self._exact(memoryview(head))
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        if kind == _DATA and int.from_bytes(head[5:], "big") == _STREAM and not flags & _PADDED:
            self._left, self._last = length, bool(flags & _END_STREAM)
            return
        if length > _MAX_CONTROL_BYTES or kind == _DATA:
            raise UnavailableError("peer", f"sent a frame of kind {kind} that gRPC does not send")
        body = bytearray(length)
        self._exact(memoryview(body))
        if kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._connection.sendall(_frame(kind, _ACK, 0, bytes(body) if kind == _PING else b""))
        elif kind in (_RST_STREAM, _GOAWAY):
            raise UnavailableError("peer", "broke the call off")
        elif kind == _HEADERS and flags & _END_STREAM:  # trailers: there is no more
            self._last = True

    def _renew(self, length: int) -> None:
        self._unrenewed += length
        if self._unrenewed >= _RENEW_BYTES:
            more, self._unrenewed = struct.pack(">I", self._unrenewed), 0
            self._connection.sendall(
                _frame(_WINDOW_UPDATE, 0, 0, more) + _frame(_WINDOW_UPDATE, 0, _STREAM, more)
            )
