"""The messages between a node and its sidecar; csrc/transfer/messages.h is the other side."""

import struct
from dataclasses import dataclass

from loraserve.errors import (
    AlreadyExistsError,
    CancelledError,
    FailedPreconditionError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)

PROTOCOL_VERSION = 1
MAX_BODY_BYTES = 64 << 10

_MAGIC = 0x4C54
_HEAD = struct.Struct("<HBBIQ")
HEAD_BYTES = _HEAD.size
_LENGTH = struct.Struct("<I")

HELLO, EXPORT, WITHDRAW, READ, CANCEL, PING = 1, 2, 3, 4, 5, 6
READY, EXPORTED, PROGRESS, ENDED, FAILED = 64, 65, 66, 67, 68

# By the order of StatusCode in csrc/base/status.h. What its deadline ends is a peer that does not
# answer: another one may.
_ERRORS: dict[int, type[LoraServeError]] = {
    1: CancelledError,
    2: InvalidArgumentError,
    3: UnavailableError,
    4: NotFoundError,
    5: AlreadyExistsError,
    6: FailedPreconditionError,
    7: ResourceExhaustedError,
    8: UnavailableError,
}


class ProtocolError(Exception):
    """The other side sent what is no message."""


@dataclass(frozen=True)
class Ready:
    ucx_version: str
    host: str
    transports: tuple[str, ...]
    worker_address: bytes


@dataclass(frozen=True)
class Exported:
    address: int
    rkey: bytes


@dataclass(frozen=True)
class Progress:
    bytes_arrived: int


@dataclass(frozen=True)
class Ended:
    transports: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    error: LoraServeError


Answer = Ready | Exported | Progress | Ended | Failed


def encode(kind: int, request_id: int, body: bytes = b"") -> bytes:
    """A frame."""
    return _HEAD.pack(_MAGIC, PROTOCOL_VERSION, kind, len(body), request_id) + body


def hello(capacity_bytes: int) -> bytes:
    return struct.pack("<Q", capacity_bytes)


def export(offset: int, length: int) -> bytes:
    return struct.pack("<QQ", offset, length)


def withdraw(offset: int) -> bytes:
    return struct.pack("<Q", offset)


def read(
    *,
    address: int,
    generation: int,
    size_bytes: int,
    skip_bytes: int,
    local_offset: int,
    timeout_s: float,
    header_bytes: int,
    worker_address: bytes,
    rkey: bytes,
) -> bytes:
    """Raises InvalidArgumentError where a value does not fit its field."""
    try:
        return (
            struct.pack(
                "<QQQQQQI",
                *(address, generation, size_bytes, skip_bytes, local_offset),
                max(1, int(min(timeout_s, 86400.0) * 1e6)),
                header_bytes,
            )
            + _sized(worker_address)
            + _sized(rkey)
        )
    except struct.error as error:
        raise InvalidArgumentError("remote_slot", f"a number out of its range: {error}") from None


def _sized(blob: bytes) -> bytes:
    if len(blob) > MAX_BODY_BYTES // 4:
        raise InvalidArgumentError("remote_slot", f"an address or key of {len(blob)} bytes")
    return _LENGTH.pack(len(blob)) + blob


def head(frame_head: bytes) -> tuple[int, int, int]:
    """(kind, body length, request id). Raises ProtocolError."""
    magic, version, kind, length, request_id = _HEAD.unpack(frame_head)
    if magic != _MAGIC or version != PROTOCOL_VERSION or length > MAX_BODY_BYTES:
        raise ProtocolError(f"magic {magic:#x}, version {version}, body of {length} bytes")
    return kind, length, request_id


class _Body:
    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, length: int) -> bytes:
        taken = self._body[self._at : self._at + length]
        if len(taken) != length:
            raise ProtocolError("a body is cut off")
        self._at += length
        return taken

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def sized(self) -> bytes:
        return self.take(self.number(4))

    def text(self) -> str:
        return self.sized().decode("utf-8", "replace")

    def words(self) -> tuple[str, ...]:
        return tuple(word for word in self.text().split(",") if word)

    def end(self) -> None:
        if self._at != len(self._body):
            raise ProtocolError("a body is too long")


def decode(kind: int, body: bytes) -> Answer:
    """Raises ProtocolError."""
    fields = _Body(body)
    answer: Answer
    if kind == READY:
        answer = Ready(fields.text(), fields.text(), fields.words(), fields.sized())
    elif kind == EXPORTED:
        answer = Exported(fields.number(8), fields.sized())
    elif kind == PROGRESS:
        answer = Progress(fields.number(8))
    elif kind == ENDED:
        answer = Ended(fields.words())
    elif kind == FAILED:
        code = fields.number(4)
        field, separator, message = fields.text().partition(": ")
        if not separator:
            field, message = "transfer", field
        answer = Failed(_ERRORS.get(code, LoraServeError)(field, message))
    else:
        raise ProtocolError(f"unknown kind {kind}")
    fields.end()
    return answer
