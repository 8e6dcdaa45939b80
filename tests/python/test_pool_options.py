"""How large a host pool is, and what of it a node takes at its start."""

import os
from pathlib import Path

import pytest

from loraserve.errors import InvalidArgumentError
from loraserve.node.pool import options as module
from loraserve.node.pool.options import PoolOptions, available_bytes, open_arena
from loraserve.node.room import usable_bytes

GIB = 1 << 30


def machine(tmp_path: Path, free_kib: int, limit: str | None = None, used: int = 0) -> int:
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {free_kib} kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
    return available_bytes(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [(None, 0, 8 * GIB), ("max", 5, 8 * GIB), (str(3 * GIB), GIB, 2 * GIB), (str(GIB), 2 * GIB, 0)],
)
def test_what_is_free_is_that_of_the_machine_and_of_the_cgroup(
    tmp_path: Path, limit: str | None, used: int, free: int
) -> None:
    assert machine(tmp_path, 8 << 20, limit, used) == free


def test_this_machine_has_memory() -> None:
    assert available_bytes() > 0


@pytest.mark.parametrize(
    ("free", "capacity"), [(64 * GIB, 4 * GIB), (2 * GIB, GIB // 2), (1 << 20, 64 << 20)]
)
def test_a_pool_that_nobody_asked_for_is_modest(
    monkeypatch: pytest.MonkeyPatch, free: int, capacity: int
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: free)
    monkeypatch.setattr(module, "_PREFAULTED_DEFAULT_BYTES", 1 << 20)
    arena = open_arena(PoolOptions())
    assert arena.capacity_bytes == capacity
    # Huge pages, where the kernel gives them, are taken whole.
    assert os.fstat(arena.fd).st_blocks * 512 <= 4 << 20


def test_a_pool_that_was_asked_for_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = open_arena(PoolOptions(host_pool_bytes=8 << 20))
    assert os.fstat(arena.fd).st_blocks * 512 == arena.capacity_bytes == 8 << 20
    monkeypatch.setattr(module, "available_bytes", lambda: 4 << 20)
    with pytest.raises(InvalidArgumentError, match="8388608, but only 4194304 bytes of memory"):
        open_arena(PoolOptions(host_pool_bytes=8 << 20))


def test_placement_counts_on_less_than_there_is() -> None:
    assert usable_bytes(8 << 20) == 7 << 20
    assert usable_bytes(0) == 0
