"""How a node's host pool and disk cache are set up."""

import logging
from dataclasses import dataclass
from pathlib import Path

from loraserve.checkpoint.packed_header import Verification
from loraserve.errors import InvalidArgumentError
from loraserve.node.fetch import MIN_FETCH_BYTES_PER_S
from loraserve.node.pool.arena import HostArena

_log = logging.getLogger(__name__)

# Under it hardly any adapter of any model fits.
LEAST_HOST_POOL_BYTES = 1 << 20
_MOST_DEFAULT_BYTES = 4 << 30
_LEAST_DEFAULT_BYTES = 64 << 20
# Of a pool that nobody asked for; the rest is faulted in when it is first used.
_PREFAULTED_DEFAULT_BYTES = 64 << 20
DEFAULT_DISK_CACHE_BYTES = 16 << 30


@dataclass(frozen=True)
class PoolOptions:
    host_pool_bytes: int | None = None
    """None: a quarter of the memory that is free, up to 4 GiB, faulted in as it is used. A pool
    whose size is given is faulted in at start."""
    disk_cache: Path | None = None
    """A directory of this node's own; None: no disk cache."""
    disk_cache_bytes: int = DEFAULT_DISK_CACHE_BYTES
    verify: Verification = "xxh3"
    """What is checked of every chunk that is read."""
    min_fetch_bytes_per_s: float = MIN_FETCH_BYTES_PER_S


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may still take: of the machine, and of its cgroup (v2)."""
    lines = (proc / "meminfo").read_text().splitlines()
    found = next(line for line in lines if line.startswith("MemAvailable:"))
    available = int(found.split()[1]) << 10
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def open_arena(options: PoolOptions) -> HostArena:
    """Blocks for as long as faulting in takes. Raises InvalidArgumentError where there is not so
    much memory, ResourceExhaustedError."""
    try:
        available = available_bytes()
    except (OSError, ValueError, StopIteration):  # a system without these files
        available = _MOST_DEFAULT_BYTES
    wanted = options.host_pool_bytes
    if wanted is None:
        capacity = max(_LEAST_DEFAULT_BYTES, min(_MOST_DEFAULT_BYTES, available // 4))
        arena = HostArena(capacity, _PREFAULTED_DEFAULT_BYTES)
    else:
        if wanted > available:
            raise InvalidArgumentError(
                "host-pool-bytes", f"{wanted}, but only {available} bytes of memory are free"
            )
        arena = HostArena(wanted)
    _log.info("host pool: %d bytes", arena.capacity_bytes)
    return arena
