"""The arena of a host pool: sealed memory that outlives its owner, and its free extents."""

import errno
import fcntl
import mmap
import os

import pytest

from loraserve.errors import (
    InvalidArgumentError,
    ResourceExhaustedError,
)
from loraserve.node.pool.arena import PAGE_BYTES, HostArena
from loraserve.node.pool.extents import FreeExtents

# The arena


def test_the_arena_is_shared_sealed_and_zero() -> None:
    arena = HostArena(3 * PAGE_BYTES - 5)
    assert arena.capacity_bytes == 3 * PAGE_BYTES
    assert os.pread(arena.fd, PAGE_BYTES, 0) == bytes(PAGE_BYTES)
    arena.view(PAGE_BYTES, 4)[:] = b"seen"
    with mmap.mmap(arena.fd, arena.capacity_bytes) as other:  # as another process maps it
        assert other[PAGE_BYTES : PAGE_BYTES + 4] == b"seen"
    for size in (0, PAGE_BYTES, 4 * PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not os.get_inheritable(arena.fd)


def test_views_outlive_the_arena() -> None:
    arena = HostArena(PAGE_BYTES)
    view = arena.view(8, 8)
    view[:] = b"12345678"
    arena.close()
    arena.close()
    del arena
    assert bytes(view) == b"12345678"


@pytest.mark.parametrize("at", [(-1, 4), (0, -1), (0, PAGE_BYTES + 1), (PAGE_BYTES, 1)])
def test_there_is_no_view_outside_the_arena(at: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgumentError, match="the arena has 4096"):
        HostArena(PAGE_BYTES).view(*at)


def test_only_the_asked_part_is_faulted_in() -> None:
    def allocated(arena: HostArena) -> int:
        return os.fstat(arena.fd).st_blocks * 512

    assert allocated(HostArena(64 * PAGE_BYTES)) == 64 * PAGE_BYTES
    assert allocated(HostArena(64 * PAGE_BYTES, 16 * PAGE_BYTES)) == 16 * PAGE_BYTES
    assert allocated(HostArena(64 * PAGE_BYTES, 0)) == 0


def test_memory_that_is_not_there_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="host_pool_bytes: 0, at least 1"):
        HostArena(0)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    answer = errno.ENOMEM

    class Full(mmap.mmap):
        def madvise(self, option: int, *where: int) -> None:
            raise OSError(answer, "Cannot allocate memory")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(mmap, "mmap", Full)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceExhaustedError, match="4096 bytes of memory: Cannot allocate"):
        HostArena(PAGE_BYTES)
    answer = errno.EINVAL  # an older kernel
    with pytest.raises(ResourceExhaustedError, match="4096 bytes of memory: No space left"):
        HostArena(PAGE_BYTES)
    assert len(os.listdir("/proc/self/fd")) == before


# Extents


def test_extents_join_their_neighbours() -> None:
    extents = FreeExtents(100)
    assert [extents.take(n) for n in (10, 20, 30, 40, 1)] == [0, 10, 30, 60, None]
    assert (extents.free_bytes, extents.largest) == (0, 0)
    extents.give(10, 20)
    extents.give(60, 40)
    assert list(extents) == [(10, 20), (60, 40)]
    extents.give(30, 30)
    assert list(extents) == [(10, 90)]
    extents.give(0, 10)
    assert list(extents) == [(0, 100)]
    assert extents.take(100) == 0
