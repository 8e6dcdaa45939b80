"""A packed adapter that comes in pieces: header first, then each chunk checked when it is whole.

Nothing is believed before it was checked, and nothing is kept but the header and one chunk, so an
upload of any size is judged while it comes.
"""

import threading
from bisect import bisect_right

import numpy as np

from loraserve.checkpoint.adapter_source import check_finite
from loraserve.checkpoint.packed_header import (
    CHUNK_BYTES,
    HEADER_SIZE_BYTES,
    Bytes,
    PackedHeader,
    Verification,
    header_bytes_of,
    parse_header,
)
from loraserve.checkpoint.safetensors_file import DTYPES
from loraserve.errors import InvalidCheckpointError, LoraServeError


class ChunkCheck:
    """The checks of one chunk after another, in any order."""

    def __init__(self, header: PackedHeader, verify: Verification, *, finite: bool = False) -> None:
        """`finite`: refuse NaN and infinite weights too, as admission must. Where the revision was
        admitted, its sums say that there are none."""
        self._header = header
        self._verify: Verification = verify
        # Where each module begins. No element lies across two chunks: their size is a multiple of
        # every element's, and so is the beginning of every matrix of its own.
        self._begins = [entry.a_offset for entry in header.entries] if finite else []

    def check(self, index: int, data: Bytes) -> None:
        """Raises InvalidCheckpointError unless `data` is chunk `index` as it should be."""
        self._header.verify_chunk(index, data, self._verify)
        if self._begins:
            self._check_finite(index * CHUNK_BYTES, memoryview(data))

    def _check_finite(self, start: int, data: memoryview) -> None:
        end = start + len(data)
        at, number = start, bisect_right(self._begins, start) - 1
        while at < end:
            entry = self._header.entries[number]
            until = min(end, entry.end)
            weights = np.frombuffer(data[at - start : until - start], DTYPES[entry.dtype])
            check_finite(f"{entry.module} of layer {entry.layer}", weights, entry.dtype)
            at, number = until, number + 1


class ArrivingData:
    """The data of a packed adapter, written in order to where it will stay, checked in place.
    `arrived` and `finish` may be called by several threads, one of which checks at a time."""

    def __init__(self, header: PackedHeader, blob: memoryview, verify: Verification) -> None:
        """`blob`: `header.size_bytes` bytes, header first."""
        self._header = header
        self._blob = blob
        self._check = ChunkCheck(header, verify)
        self._lock = threading.Lock()
        self._checked = 0  # chunks
        self.position = header.header_bytes
        """Of the first byte in `blob` that has not been said to have arrived."""

    def arrived(self, n_bytes: int) -> None:
        """The next `n_bytes` are there. Raises InvalidCheckpointError."""
        with self._lock:
            self._arrived(n_bytes)

    def finish(self) -> None:
        """All of `blob` is there: checks what `arrived` was not called for. Raises
        InvalidCheckpointError."""
        with self._lock:
            self._arrived(self._header.size_bytes - self.position)

    def _arrived(self, n_bytes: int) -> None:
        header = self._header
        if n_bytes < 0 or self.position + n_bytes > header.size_bytes:
            raise InvalidCheckpointError(
                "size_bytes", f"more than the {header.size_bytes} bytes of the header"
            )
        self.position += n_bytes
        while self._checked < header.chunk_count:
            start, length = header.chunk_range(self._checked)
            if start + length > self.position:
                return
            # A chunk that is wrong is not counted: it is wrong again for whoever comes next.
            self._check.check(self._checked, self._blob[start : start + length])
            self._checked += 1


class PackedStream:
    """Takes the bytes of a packed adapter in pieces of any size and keeps none of them."""

    def __init__(
        self,
        *,
        revision: str | None = None,
        verify: Verification = "xxh3",
        finite: bool = True,
    ) -> None:
        """`revision`, where given, is what the header must hash to; `verify` and `finite` as in
        `parse_packed`, which would say the same about the same bytes."""
        self._revision = revision
        self._verify: Verification = verify
        self._finite = finite
        self._start = bytearray()  # the header, until it is whole
        self._check: ChunkCheck | None = None
        self._chunk = bytearray()
        self._next_chunk = 0
        self._error: LoraServeError | None = None
        self.header: PackedHeader | None = None
        """Once it has come and was checked."""
        self.received = 0
        """Bytes so far."""

    def feed(self, data: Bytes) -> None:
        """The next bytes. Raises InvalidCheckpointError or UnsupportedError as soon as they cannot
        be those of a packed adapter, and the same from then on."""
        if self._error is not None:
            raise self._error
        try:
            rest = memoryview(data).cast("B")
            self.received += len(rest)
            if self.header is None:
                rest = self._take_header(rest)
            if self.header is not None:
                self._take_data(self.header, rest)
        except LoraServeError as error:
            self._error = error
            raise

    def finish(self) -> PackedHeader:
        """The header; every byte was checked. Raises as `feed`, and where bytes are missing."""
        if self._error is not None:
            raise self._error
        if self.header is None:
            header_bytes_of(self._start)
            raise InvalidCheckpointError("header", f"ends after {self.received} bytes")
        if self.received != self.header.size_bytes:
            raise InvalidCheckpointError(
                "size_bytes",
                f"{self.received} bytes, the header says {self.header.size_bytes}",
            )
        return self.header

    def _take_header(self, rest: memoryview) -> memoryview:
        """What of `rest` comes after the header; empty while there is no header."""
        if len(self._start) < HEADER_SIZE_BYTES:
            missing = HEADER_SIZE_BYTES - len(self._start)
            self._start += rest[:missing]
            rest = rest[missing:]
            if len(self._start) < HEADER_SIZE_BYTES:
                return rest
        size = header_bytes_of(self._start)
        missing = size - len(self._start)
        self._start += rest[:missing]
        if len(self._start) == size:
            self.header = parse_header(self._start, revision=self._revision)
            self._check = ChunkCheck(self.header, self._verify, finite=self._finite)
            self._start = bytearray()
        return rest[missing:]

    def _take_data(self, header: PackedHeader, rest: memoryview) -> None:
        if self.received > header.size_bytes:
            raise InvalidCheckpointError(
                "size_bytes", f"more than the {header.size_bytes} bytes of the header"
            )
        assert self._check is not None
        while rest:
            _, length = header.chunk_range(self._next_chunk)
            if not self._chunk and len(rest) >= length:  # no copy where it comes in one piece
                self._check.check(self._next_chunk, rest[:length])
                rest = rest[length:]
            else:
                missing = length - len(self._chunk)
                self._chunk += rest[:missing]
                rest = rest[missing:]
                if len(self._chunk) < length:
                    return
                self._check.check(self._next_chunk, self._chunk)
                self._chunk = bytearray()
            self._next_chunk += 1
