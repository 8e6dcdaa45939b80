"""The host pool: sealed memory, slots with generations, leases, and when memory goes back."""

import contextlib
import os
import random
import struct

import pytest
from fuzz_budget import examples

from loraserve.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    ResourceExhaustedError,
)
from loraserve.node.pool import slots
from loraserve.node.pool.arena import PAGE_BYTES, HostArena
from loraserve.node.pool.slots import (
    MAX_LEASE_S,
    SLOT_HEADER_BYTES,
    SLOT_MAGIC,
    HostPool,
    Slot,
    SlotWriter,
    slot_bytes,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def pool_of(pages: int, **options: int) -> tuple[HostPool, Clock]:
    clock = Clock()
    return HostPool(HostArena(pages * PAGE_BYTES), clock, **options), clock


def put(pool: HostPool, revision: str, size: int, byte: int = 7) -> Slot:
    writer = pool.reserve(size)
    writer.view[:] = bytes([byte]) * size
    return writer.seal(revision)


def header_of(pool: HostPool, offset: int) -> tuple[bytes, int, int]:
    """As another process reads it: through the descriptor."""
    magic, generation, size = struct.unpack("<8sQQ", os.pread(pool.arena.fd, 24, offset))
    return magic, generation, size


# Slots


def test_a_slot_has_its_header_and_its_bytes() -> None:
    pool, _ = pool_of(4)
    writer = pool.reserve(5000)
    assert len(writer.view) == 5000
    assert header_of(pool, writer.offset) == (SLOT_MAGIC, 0, 0)
    writer.view[:] = b"x" * 5000
    assert pool.find("r") is None
    slot = writer.seal("r")
    assert pool.find("r") is slot
    assert header_of(pool, slot.offset) == (SLOT_MAGIC, slot.generation, 5000)
    at = slot.offset + SLOT_HEADER_BYTES
    assert at == slot.data_offset
    assert os.pread(pool.arena.fd, 5000, at) == b"x" * 5000 == bytes(slot.view)
    assert slot.view.readonly
    assert (pool.bytes_held, pool.bytes_free) == (2 * PAGE_BYTES, 2 * PAGE_BYTES)


def test_sizes_are_rounded_up_with_the_header() -> None:
    assert slot_bytes(PAGE_BYTES - SLOT_HEADER_BYTES) == PAGE_BYTES
    assert slot_bytes(PAGE_BYTES - SLOT_HEADER_BYTES + 1) == 2 * PAGE_BYTES
    pool, _ = pool_of(1)
    assert len(pool.reserve(PAGE_BYTES - SLOT_HEADER_BYTES).view) == PAGE_BYTES - SLOT_HEADER_BYTES
    with pytest.raises(InvalidArgumentError, match="size_bytes: 0"):
        pool.reserve(0)


def test_no_room_says_what_there_is() -> None:
    pool, _ = pool_of(4)
    for name in "abcd":
        put(pool, name, 1)
    pool.drop("a")
    pool.drop("c")
    with pytest.raises(
        ResourceExhaustedError, match=r"5000 bytes needed, 8192 of 16384 .* 4096 in"
    ):
        pool.reserve(5000)
    pool.drop("b")
    assert pool.reserve(2 * PAGE_BYTES).offset == 0


def test_a_reservation_that_is_abandoned_goes_back() -> None:
    pool, _ = pool_of(1)
    writer = pool.reserve(9)
    writer.abandon()
    writer.abandon()
    assert pool.bytes_free == PAGE_BYTES
    pool.reserve(9).seal("r")
    with pytest.raises(AssertionError):
        writer.seal("r")


def test_a_revision_is_there_once() -> None:
    pool, _ = pool_of(2)
    first = put(pool, "r", 9)
    second = pool.reserve(9)
    with pytest.raises(AlreadyExistsError):
        second.seal("r")
    assert pool.find("r") is first
    assert pool.bytes_free == PAGE_BYTES


def test_pins_keep_bytes_and_generation_of_a_dropped_slot() -> None:
    pool, _ = pool_of(1)
    put(pool, "r", 9)
    slot, again = pool.pin("r"), pool.pin("r")
    pool.drop("r")
    pool.drop("r")
    assert pool.find("r") is None
    with pytest.raises(NotFoundError):
        pool.pin("r")
    with pytest.raises(ResourceExhaustedError):
        pool.reserve(9)
    pool.unpin(slot)
    assert header_of(pool, 0) == (SLOT_MAGIC, slot.generation, 9)
    assert (pool.bytes_held, pool.stats().quarantined_bytes) == (0, PAGE_BYTES)
    pool.unpin(again)
    assert header_of(pool, 0)[1] == 0
    assert pool.bytes_free == PAGE_BYTES
    with pytest.raises(AssertionError):
        pool.unpin(slot)


def test_generations_rise_over_the_whole_pool() -> None:
    pool, _ = pool_of(2)
    seen = [put(pool, str(i), 9).generation for i in range(2)]
    pool.drop("0")
    seen.append(put(pool, "0", 9).generation)
    assert seen == sorted(set(seen))
    assert seen[0] > 0


def test_no_old_header_survives_inside_a_new_slot() -> None:
    pool, _ = pool_of(2)
    put(pool, "a", 9)
    old = put(pool, "b", 9)
    pool.drop("a")
    pool.drop("b")
    pool.reserve(2 * PAGE_BYTES - SLOT_HEADER_BYTES)
    assert header_of(pool, old.offset)[1] == 0


def test_a_dropped_slot_that_is_still_read_comes_back_to_life() -> None:
    pool, _ = pool_of(2)
    slot = put(pool, "r", 9)
    lease = pool.lease("r", 10)
    assert pool.revive("r") is None  # it is here
    pool.drop("r")
    assert pool.revive("other") is None
    assert pool.revive("r") is slot is pool.find("r")
    pool.release(lease.lease_id)
    assert pool.find("r") is slot
    assert pool.bytes_held == PAGE_BYTES
    pool.drop("r")
    assert pool.revive("r") is None
    assert pool.bytes_free == 2 * PAGE_BYTES


# Leases


def test_a_lease_holds_until_it_is_released_or_over() -> None:
    pool, clock = pool_of(2)
    put(pool, "a", 9)
    put(pool, "b", 9)
    first, second = pool.lease("a", 10), pool.lease("b", 20)
    assert first.expires_s == clock.now_s + 10
    assert pool.next_expiry_s == 10
    assert first.lease_id != second.lease_id
    pool.drop("a")
    pool.drop("b")
    pool.release(first.lease_id)
    pool.release(first.lease_id)
    assert pool.bytes_free == PAGE_BYTES
    clock.now_s += 19.9
    pool.expire()
    assert pool.bytes_free == PAGE_BYTES
    clock.now_s += 0.2
    assert len(pool.reserve(PAGE_BYTES).view) == PAGE_BYTES  # expires by itself
    pool.release(second.lease_id)
    assert pool.stats().leases == 0


def test_an_undropped_slot_outlives_its_leases() -> None:
    pool, clock = pool_of(1)
    slot = put(pool, "r", 9)
    pool.lease("r", 1)
    clock.now_s += 2
    pool.expire()
    assert pool.find("r") is slot
    assert not slot.in_use


def test_leases_are_bounded() -> None:
    pool, clock = pool_of(1, max_leases=3)
    put(pool, "r", 9)
    given = [pool.lease("r", 10) for _ in range(3)]
    with pytest.raises(ResourceExhaustedError, match="leases: 3 are given"):
        pool.lease("r", 10)
    pool.release(given[1].lease_id)
    pool.lease("r", 10)
    clock.now_s += 11
    pool.lease("r", 10)
    with pytest.raises(NotFoundError):
        pool.lease("other", 10)
    for ttl_s in (0.0, -1.0, MAX_LEASE_S + 1, float("nan")):
        with pytest.raises(InvalidArgumentError, match="ttl"):
            pool.lease("r", ttl_s)


def test_one_peer_has_some_of_the_leases_and_half_of_the_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "MAX_PEER_LEASES", 3)
    pool, clock = pool_of(6, max_leases=8)
    put(pool, "large", 3 * PAGE_BYTES)
    put(pool, "small", 9)
    put(pool, "other", 9)
    first = pool.lease("large", 10, "p")  # one may have any size
    with pytest.raises(ResourceExhaustedError, match="bytes of") as caught:
        pool.lease("small", 10, "p")
    assert caught.value.retry_after_s
    pool.release(first.lease_id)
    for _ in range(3):
        pool.lease("small", 10, "p")
    with pytest.raises(ResourceExhaustedError, match="3 are given to this peer"):
        pool.lease("other", 10, "p")
    pool.lease("other", 10, "q")
    clock.now_s += 10
    pool.lease("other", 10, "p")  # the others have lapsed
    pool.expire()
    assert set(pool._peer_leases) == {"p"}


def test_many_short_leases_leave_nothing_behind() -> None:
    pool, _ = pool_of(1)
    put(pool, "r", 9)
    for _ in range(5000):
        pool.release(pool.lease("r", 3600).lease_id)
    assert len(pool._expiries) < 100


class Walk:
    """A pool under random steps, and what must hold after each."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pages = self.random.randint(1, 24)
        self.pool, self.clock = pool_of(self.pages, max_leases=6)
        self.alive: dict[int, tuple[Slot, bytes]] = {}  # by generation: must not change
        self.pinned: list[Slot] = []
        self.leased: list[int] = []
        self.writing: list[tuple[SlotWriter, str]] = []

    def step(self) -> None:
        pick, pool = self.random, self.pool
        name = pick.choice("abcdefgh")
        match pick.randrange(9):
            case 0 | 1:
                size = pick.randint(1, 5 * PAGE_BYTES)
                try:
                    writer = pool.reserve(size)
                except ResourceExhaustedError:
                    assert max((n for _, n in pool._extents), default=0) < slot_bytes(size)
                else:
                    writer.view[:] = pick.randbytes(size)
                    self.writing.append((writer, name))
            case 2 if self.writing:
                writer, wanted = self.writing.pop(pick.randrange(len(self.writing)))
                if pick.random() < 0.3:
                    writer.abandon()
                else:
                    try:
                        slot = writer.seal(wanted)
                    except AlreadyExistsError:
                        assert pool.find(wanted) is not None
                    else:
                        assert slot.generation > max(self.alive, default=0)
                        self.alive[slot.generation] = (slot, bytes(slot.view))
            case 3:
                pool.drop(name)
                assert pool.find(name) is None
            case 4:
                try:
                    self.pinned.append(pool.pin(name))
                except NotFoundError:
                    assert pool.find(name) is None
            case 5 if self.pinned:
                pool.unpin(self.pinned.pop(pick.randrange(len(self.pinned))))
            case 6:
                with contextlib.suppress(LoraServeError):
                    self.leased.append(pool.lease(name, pick.randint(1, 20)).lease_id)
            case 7 if self.leased:
                pool.release(self.leased.pop(pick.randrange(len(self.leased))))
            case _:
                self.clock.now_s += pick.randint(0, 8)
                pool.revive(name)

    def check(self) -> None:
        pool = self.pool
        pool.expire()
        ends = []
        for generation, (slot, data) in list(self.alive.items()):
            if pool.find(slot.revision) is slot or slot.in_use:
                assert bytes(slot.view) == data
                assert header_of(pool, slot.offset) == (SLOT_MAGIC, generation, slot.size_bytes)
                ends.append((slot.offset, slot.offset + slot_bytes(slot.size_bytes)))
            else:
                del self.alive[generation]
        for writer, _ in self.writing:
            ends.append((writer.offset, writer.offset + slot_bytes(writer.size_bytes)))
        ends += [(o, o + n) for o, n in pool._extents]
        ends.sort()
        # Every byte is in exactly one place.
        assert [a for a, _ in ends] == [0, *(b for _, b in ends[:-1])]
        assert ends[-1][1] == pool.capacity_bytes
        stats = pool.stats()
        assert stats.free_bytes + stats.held_bytes + stats.writing_bytes + (
            stats.quarantined_bytes
        ) == (self.pages * PAGE_BYTES)
        assert stats.held_bytes == sum(n for _, n, slot in pool.layout() if slot is not None)
        assert stats.writing_bytes == sum(slot_bytes(w.size_bytes) for w, _ in self.writing)


@pytest.mark.parametrize("seed", range(examples(60)))
def test_a_random_walk_keeps_every_promise(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(120):
        walk.step()
        walk.check()
