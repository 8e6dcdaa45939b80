"""The memory of a host pool: one shared mapping that other processes of this host may be handed."""

import contextlib
import errno
import fcntl
import mmap
import os

from loraserve.errors import InvalidArgumentError, ResourceExhaustedError

PAGE_BYTES = 4096
# Faulted in piece by piece, so that other threads of the process run in between.
_PIECE_BYTES = 16 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python does not name it


class HostArena:
    """A memfd, mapped shared and writable, zero at first.

    It is sealed against shrinking and growing: whoever holds the descriptor can read and write
    the memory, but not take pages away under a reader. The mapping stays for as long as the
    process, or a view of it, lives. The methods are thread-safe.
    """

    page_locked = False
    """Whether the pages are locked and known to a GPU's driver, which then reads them itself."""

    def __init__(self, capacity_bytes: int, prefault_bytes: int | None = None) -> None:
        """`capacity_bytes` is rounded up to whole pages. The first `prefault_bytes` (None: all)
        are faulted in now, later ones when they are first written.

        Raises InvalidArgumentError, ResourceExhaustedError (not so much memory).
        """
        if capacity_bytes < 1:
            raise InvalidArgumentError("host_pool_bytes", f"{capacity_bytes}, at least 1")
        self.capacity_bytes = -(-capacity_bytes // PAGE_BYTES) * PAGE_BYTES
        self.fd = os.memfd_create("loraserve-host-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.capacity_bytes)
            fcntl.fcntl(
                self.fd,
                fcntl.F_ADD_SEALS,
                fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
            )
            self._mapping = mmap.mmap(self.fd, self.capacity_bytes, mmap.MAP_SHARED)
            # Another process of this host reads huge pages at the cost of a copy, small ones at 2
            # to 3 times that (docs/adapter-pool-transport.md). The kernel's settings decide.
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
            self._prefault(self.capacity_bytes if prefault_bytes is None else prefault_bytes)
        except OSError as error:
            os.close(self.fd)
            raise ResourceExhaustedError(
                "host_pool_bytes", f"{self.capacity_bytes} bytes of memory: {error.strerror}"
            ) from None
        self._memory = memoryview(self._mapping)

    def _prefault(self, length: int) -> None:
        end = min(length, self.capacity_bytes)
        for offset in range(0, end, _PIECE_BYTES):
            piece = min(_PIECE_BYTES, end - offset)
            # Both say no where there is no memory; touching the pages would end the process.
            try:
                self._mapping.madvise(_MADV_POPULATE_WRITE, offset, piece)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # An older kernel: faults at the first touch. Never huge pages.
                os.posix_fallocate(self.fd, offset, piece)

    def view(self, offset: int, length: int) -> memoryview:
        """Writable bytes. Raises InvalidArgumentError outside the arena."""
        if offset < 0 or length < 0 or offset + length > self.capacity_bytes:
            raise InvalidArgumentError(
                "offset", f"{offset} and {length} bytes, the arena has {self.capacity_bytes}"
            )
        return self._memory[offset : offset + length]

    def close(self) -> None:
        """Only when the process is about to end. Views stay valid; the memory goes back with the
        last of them."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
