"""Which parts of an arena are free: extents in whole pages, first fit."""

from bisect import bisect_left
from collections.abc import Iterator


class FreeExtents:
    """Of the bytes 0 to `capacity_bytes`; neighbours are always joined. Everything is free at
    first."""

    def __init__(self, capacity_bytes: int) -> None:
        self._offsets = [0]
        self._lengths = [capacity_bytes]
        self.free_bytes = capacity_bytes

    def take(self, length: int) -> int | None:
        """The offset of the lowest extent with so many bytes; None where none is that long."""
        for i, free in enumerate(self._lengths):
            if free < length:
                continue
            offset = self._offsets[i]
            if free == length:
                del self._offsets[i], self._lengths[i]
            else:
                self._offsets[i] += length
                self._lengths[i] -= length
            self.free_bytes -= length
            return offset
        return None

    def give(self, offset: int, length: int) -> None:
        """Gives back what `take` gave."""
        i = bisect_left(self._offsets, offset)
        before = i > 0 and self._offsets[i - 1] + self._lengths[i - 1] == offset
        after = i < len(self._offsets) and offset + length == self._offsets[i]
        self.free_bytes += length
        if before and after:
            self._lengths[i - 1] += length + self._lengths[i]
            del self._offsets[i], self._lengths[i]
        elif before:
            self._lengths[i - 1] += length
        elif after:
            self._offsets[i] = offset
            self._lengths[i] += length
        else:
            self._offsets.insert(i, offset)
            self._lengths.insert(i, length)

    @property
    def largest(self) -> int:
        return max(self._lengths, default=0)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(offset, length), ascending."""
        return zip(self._offsets, self._lengths, strict=True)
