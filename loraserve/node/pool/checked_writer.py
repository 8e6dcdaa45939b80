"""Where one source writes the bytes of one adapter, and where they are checked."""

import threading

from loraserve.checkpoint.packed_header import Bytes, PackedHeader, Verification
from loraserve.checkpoint.packed_stream import ArrivingData, ChunkCheck
from loraserve.errors import UnavailableError
from loraserve.node.pool.slots import SlotWriter


class CheckedWriter:
    """A reserved slot, lent to one source. The header is in `view` already; the source brings the
    rest, from `position` on, in one of two ways.

    A source that has the bytes in its hands calls `write`, from any one thread; after `revoke` that
    raises and touches nothing, so a thread that hangs in a read can be left behind. A source that
    has them written there (a one-sided read) calls `arrived`, and has ended every write when it
    returns, raises or has been cancelled.
    """

    def __init__(self, slot: SlotWriter, header: PackedHeader, verify: Verification) -> None:
        self.view = slot.view
        """The packed bytes, header first."""
        self.offset = slot.offset
        """Of the slot header in the arena, as in Slot."""
        self.data_offset = slot.data_offset
        """Of `view` in the arena."""
        self.size_bytes = slot.size_bytes
        self._header = header
        # As they arrive, at memory speed; a slower sum is taken at the end, in a thread.
        self._arriving = ArrivingData(header, self.view, "xxh3")
        self._sha256 = ChunkCheck(header, "sha256") if verify == "sha256" else None
        self._lock = threading.Lock()
        self._revoked = False

    @property
    def position(self) -> int:
        """In `view`, of the next byte to come."""
        return self._arriving.position

    def write(self, data: Bytes) -> None:
        """The next bytes. Raises InvalidCheckpointError as soon as a chunk is wrong or there are
        too many, UnavailableError after `revoke`."""
        raw = memoryview(data)
        with self._lock:
            if self._revoked:
                raise UnavailableError("adapter", "another source is read by now")
            begin = self.position
            if begin + len(raw) <= self.size_bytes:
                self.view[begin : begin + len(raw)] = raw
            self._arriving.arrived(len(raw))

    def arrived(self, n_bytes: int) -> None:
        """The next `n_bytes` are in `view`. Raises InvalidCheckpointError."""
        self._arriving.arrived(n_bytes)

    def revoke(self) -> None:
        """The source is done with, one way or the other."""
        with self._lock:
            self._revoked = True

    def finish(self) -> None:
        """Checks what has not been checked; blocks for as long as hashing takes. The source has
        filled all of `view`. Raises InvalidCheckpointError."""
        self._arriving.finish()
        if self._sha256 is not None:
            for index in range(self._header.chunk_count):
                start, length = self._header.chunk_range(index)
                self._sha256.check(index, self.view[start : start + length])
