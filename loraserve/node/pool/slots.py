"""The slots of a host pool: where packed adapters lie in the arena, who reads them, and when their
memory may be used again.

A slot is a header of 64 bytes and then the packed bytes. The header carries the slot's generation,
which a reader in another process checks before and after it reads: it is 0 while the bytes change,
and no two slots ever have the same.
"""

import heapq
import itertools
import secrets
import struct
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from loraserve.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
)
from loraserve.node.pool.arena import PAGE_BYTES, HostArena
from loraserve.node.pool.extents import FreeExtents

SLOT_MAGIC = b"LORASLOT"
SLOT_HEADER_BYTES = 64
MAX_LEASES = 4096
MAX_LEASE_S = 3600.0
# Of one peer. It may have leased half of a pool besides, or one copy of any size.
MAX_PEER_LEASES = 64

_SLOT_HEADER = struct.Struct("<8sQQ40x")  # magic, generation, size in bytes of the packed adapter


def slot_bytes(size_bytes: int) -> int:
    """What a packed adapter of `size_bytes` takes of an arena."""
    return -(-(SLOT_HEADER_BYTES + size_bytes) // PAGE_BYTES) * PAGE_BYTES


@dataclass(eq=False)
class Slot:
    """A whole packed adapter in the arena. `offset` is that of the slot header in the arena, the
    packed bytes follow at `data_offset`."""

    revision: str
    offset: int
    size_bytes: int
    """Of the packed bytes."""
    generation: int
    view: memoryview = field(repr=False)
    """The packed bytes, read-only."""
    pins: int = 0
    leases: int = 0
    dropped: bool = False
    """Nobody finds it any more; its memory goes back with its last reader."""

    @property
    def data_offset(self) -> int:
        return self.offset + SLOT_HEADER_BYTES

    @property
    def in_use(self) -> bool:
        return bool(self.pins or self.leases)


@dataclass(frozen=True, eq=False)
class Lease:
    """A promise that the bytes and the generation of a slot stay as they are until `expires_s` (of
    the pool's clock)."""

    lease_id: int
    slot: Slot
    expires_s: float
    peer: Hashable = None


class SlotWriter:
    """A reserved slot that nobody finds yet. Ends with `seal` or `abandon`."""

    def __init__(self, pool: "HostPool", offset: int, size_bytes: int, view: memoryview) -> None:
        self._pool = pool
        self.offset = offset
        """Of the slot header, as in Slot."""
        self.size_bytes = size_bytes
        self.view = view
        """The packed bytes, to be written; threads may."""
        self._open = True

    @property
    def data_offset(self) -> int:
        return self.offset + SLOT_HEADER_BYTES

    def seal(self, revision: str) -> Slot:
        """The bytes are all there and were checked; they do not change any more. Raises
        AlreadyExistsError where the pool has the revision (the slot is abandoned then)."""
        self._end()
        return self._pool._seal(self, revision)

    def abandon(self) -> None:
        """Gives the memory back; nothing happens after `seal` or `abandon`. No thread may write to
        `view` any more."""
        if self._open:
            self._end()
            self._pool._free(self.offset, self.size_bytes)

    def _end(self) -> None:
        assert self._open, "a slot is sealed once"
        self._open = False


@dataclass(frozen=True)
class PoolStats:
    """Bytes are of the arena, headers and rounding included."""

    capacity_bytes: int
    free_bytes: int
    largest_free_bytes: int
    held_bytes: int
    """In slots that can be found."""
    writing_bytes: int
    """Reserved, not sealed."""
    leased_bytes: int
    """In slots with a lease, dropped or not."""
    quarantined_bytes: int
    """Dropped, and still read by somebody."""
    slots: int
    leases: int


class HostPool:
    """Packed adapters by revision. Not thread-safe: event loop only; views may be read by threads
    that hold a pin, and written by threads that hold the writer."""

    def __init__(
        self, arena: HostArena, clock: Callable[[], float], max_leases: int = MAX_LEASES
    ) -> None:
        """`clock`: seconds, of any beginning, that never go back."""
        self.arena = arena
        self._clock = clock
        self._max_leases = max_leases
        self._extents = FreeExtents(arena.capacity_bytes)
        self._slots: dict[str, Slot] = {}
        self._quarantined: set[Slot] = set()
        self._leases: dict[int, Lease] = {}
        self._peer_leases: Counter[Hashable] = Counter()
        self._peer_bytes: Counter[Hashable] = Counter()
        self._expiries: list[tuple[float, int]] = []
        self._generations = itertools.count(1)
        self._held_bytes = 0
        self.on_free: Callable[[Slot], None] = lambda slot: None
        """Hears of every slot whose memory has gone back."""

    # Slots

    def reserve(self, size_bytes: int) -> SlotWriter:
        """Room for a packed adapter of `size_bytes`. Raises InvalidArgumentError,
        ResourceExhaustedError where no free extent is that long."""
        if size_bytes < 1:
            raise InvalidArgumentError("size_bytes", f"{size_bytes}, at least 1")
        self.expire()
        need = slot_bytes(size_bytes)
        offset = self._extents.take(need)
        if offset is None:
            raise ResourceExhaustedError(
                "host_pool_bytes",
                f"{size_bytes} bytes needed, {self._extents.free_bytes} of "
                f"{self.arena.capacity_bytes} are free, {self._extents.largest} in one piece",
            )
        self._write_header(offset, 0, 0)
        view = self.arena.view(offset + SLOT_HEADER_BYTES, size_bytes)
        return SlotWriter(self, offset, size_bytes, view)

    def _seal(self, writer: SlotWriter, revision: str) -> Slot:
        if revision in self._slots:
            self._free(writer.offset, writer.size_bytes)
            raise AlreadyExistsError("revision", f"{revision} is in the host pool")
        generation = next(self._generations)
        self._write_header(writer.offset, generation, writer.size_bytes)
        slot = Slot(
            *(revision, writer.offset, writer.size_bytes, generation, writer.view.toreadonly())
        )
        self._slots[revision] = slot
        self._held_bytes += slot_bytes(slot.size_bytes)
        return slot

    def _write_header(self, offset: int, generation: int, size_bytes: int) -> None:
        header = self.arena.view(offset, SLOT_HEADER_BYTES)
        _SLOT_HEADER.pack_into(header, 0, SLOT_MAGIC, generation, size_bytes)

    def _free(self, offset: int, size_bytes: int) -> None:
        # Before another slot can lie across this header: who still reads by it must see the end.
        self._write_header(offset, 0, 0)
        self._extents.give(offset, slot_bytes(size_bytes))

    def _free_slot(self, slot: Slot) -> None:
        self._free(slot.offset, slot.size_bytes)
        self.on_free(slot)

    def find(self, revision: str) -> Slot | None:
        return self._slots.get(revision)

    def drop(self, revision: str) -> None:
        """Nobody finds the slot any more; its memory goes back when the last pin and lease of it
        has ended. Nothing happens where it is not here."""
        slot = self._slots.pop(revision, None)
        if slot is None:
            return
        self.expire()
        slot.dropped = True
        self._held_bytes -= slot_bytes(slot.size_bytes)
        if slot.in_use:
            self._quarantined.add(slot)
        else:
            self._free_slot(slot)

    def revive(self, revision: str) -> Slot | None:
        """A slot that was dropped and is still read can be found again; None where there is none,
        or another one of the revision took its place."""
        if revision in self._slots:
            return None
        for slot in self._quarantined:
            if slot.revision == revision:
                self._quarantined.discard(slot)
                slot.dropped = False
                self._slots[revision] = slot
                self._held_bytes += slot_bytes(slot.size_bytes)
                return slot
        return None

    # Readers

    def pin(self, revision: str) -> Slot:
        """For a reader of this process: the slot stays until `unpin`. Raises NotFoundError."""
        slot = self._slots.get(revision)
        if slot is None:
            raise NotFoundError("revision", f"{revision} is not in the host pool")
        slot.pins += 1
        return slot

    def unpin(self, slot: Slot) -> None:
        """Once for each `pin`."""
        assert slot.pins > 0, "was not pinned"
        slot.pins -= 1
        self._reader_ended(slot)

    def lease(self, revision: str, ttl_s: float, peer: Hashable = None) -> Lease:
        """For a reader of another process, who may vanish. `ttl_s` is up to MAX_LEASE_S. `peer`:
        who reads; None: bounded with all others only.

        Raises NotFoundError, InvalidArgumentError, ResourceExhaustedError over a bound of leases.
        """
        if not 0 < ttl_s <= MAX_LEASE_S:
            raise InvalidArgumentError("ttl", f"{ttl_s:g} s is not within 0 and {MAX_LEASE_S:g}")
        self.expire()
        slot = self._slots.get(revision)
        if slot is None:
            raise NotFoundError("revision", f"{revision} is not in the host pool")
        if len(self._leases) >= self._max_leases:
            raise ResourceExhaustedError("leases", f"{self._max_leases} are given", 1.0)
        if peer is not None:
            self._check_peer(peer, slot)
        # Not to be guessed: whoever knows it can end it.
        lease = Lease(secrets.randbits(63), slot, self._clock() + ttl_s, peer)
        self._peer_leases[peer] += 1
        self._peer_bytes[peer] += slot_bytes(slot.size_bytes)
        self._leases[lease.lease_id] = lease
        heapq.heappush(self._expiries, (lease.expires_s, lease.lease_id))
        slot.leases += 1
        return lease

    def _check_peer(self, peer: Hashable, slot: Slot) -> None:
        given, taken = self._peer_leases[peer], self._peer_bytes[peer]
        if given >= MAX_PEER_LEASES:
            raise ResourceExhaustedError("leases", f"{given} are given to this peer", 1.0)
        if given and taken + slot_bytes(slot.size_bytes) > self.capacity_bytes // 2:
            raise ResourceExhaustedError(
                "leases", f"{taken} bytes of {self.capacity_bytes} are given to this peer", 1.0
            )

    def release(self, lease_id: int) -> None:
        """Nothing happens where the lease has ended."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        if len(self._expiries) > 2 * len(self._leases) + 64:  # mostly of leases that have ended
            self._expiries = [(held.expires_s, held.lease_id) for held in self._leases.values()]
            heapq.heapify(self._expiries)
        self._peer_leases[lease.peer] -= 1
        self._peer_bytes[lease.peer] -= slot_bytes(lease.slot.size_bytes)
        if not self._peer_leases[lease.peer]:
            del self._peer_leases[lease.peer], self._peer_bytes[lease.peer]
        lease.slot.leases -= 1
        self._reader_ended(lease.slot)

    def expire(self) -> None:
        """Ends the leases whose time is over. `reserve`, `drop` and `lease` do so themselves."""
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            self.release(heapq.heappop(self._expiries)[1])

    def _reader_ended(self, slot: Slot) -> None:
        if slot.dropped and not slot.in_use:
            self._quarantined.discard(slot)
            self._free_slot(slot)

    # What is here

    @property
    def next_expiry_s(self) -> float | None:
        """In how many seconds `expire` may have something to do."""
        return max(0.0, self._expiries[0][0] - self._clock()) if self._expiries else None

    @property
    def capacity_bytes(self) -> int:
        return self.arena.capacity_bytes

    @property
    def bytes_held(self) -> int:
        """In slots that can be found, headers and rounding included."""
        return self._held_bytes

    @property
    def bytes_free(self) -> int:
        return self._extents.free_bytes

    def has_room(self, n_bytes: int) -> bool:
        """Whether so many bytes, as of `slot_bytes`, are free in one piece."""
        return self._extents.largest >= n_bytes

    def layout(self) -> list[tuple[int, int, Slot | None]]:
        """(offset, length, slot) of every sealed slot that can be found and, with None, of every
        free extent; by offset. What is being written or is quarantined is missing."""
        parts: list[tuple[int, int, Slot | None]] = [(o, n, None) for o, n in self._extents]
        parts += [(s.offset, slot_bytes(s.size_bytes), s) for s in self._slots.values()]
        return sorted(parts, key=lambda part: part[0])

    def stats(self) -> PoolStats:
        leased = {lease.slot for lease in list(self._leases.values())}
        quarantined = sum(slot_bytes(slot.size_bytes) for slot in list(self._quarantined))
        capacity, free = self.arena.capacity_bytes, self._extents.free_bytes
        return PoolStats(
            capacity_bytes=capacity,
            free_bytes=free,
            largest_free_bytes=self._extents.largest,
            held_bytes=self._held_bytes,
            writing_bytes=capacity - free - self._held_bytes - quarantined,
            leased_bytes=sum(slot_bytes(slot.size_bytes) for slot in leased),
            quarantined_bytes=quarantined,
            slots=len(self._slots),
            leases=len(self._leases),
        )
