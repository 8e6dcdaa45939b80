"""Which copies must go so that one more fits into the host pool of a node."""

import itertools
from collections.abc import Callable, Iterable

from loraserve.errors import ResourceExhaustedError
from loraserve.node.held import FETCHING, HeldAdapter
from loraserve.node.limits import RETRY_AFTER_S
from loraserve.node.pool.copies import HostCopies
from loraserve.node.pool.eviction import Part, victims, worth
from loraserve.node.pool.slots import Slot, slot_bytes
from loraserve.placement.types import AdapterSpec

# Seconds that it takes to get a copy back.
Cost = Callable[[HeldAdapter], float]


def usable_bytes(capacity_bytes: int) -> int:
    """What placement may count on in packed bytes. An eighth is left for slot headers, gaps between
    slots, and revisions that stand beside those that they are about to replace."""
    return capacity_bytes - capacity_bytes // 8


class HostRoom:
    """Of one pool and those who hold its slots."""

    def __init__(self, copies: HostCopies, cost: Cost) -> None:
        self._copies = copies
        self._cost = cost
        self._age = 0.0  # see pool/eviction.py
        self._uses = itertools.count(1)

    def used(self, held: HeldAdapter) -> None:
        held.used, held.age = next(self._uses), self._age

    def copies_to_evict(
        self, held_here: Iterable[HeldAdapter], spec: AdapterSpec, promised: bool
    ) -> list[HeldAdapter]:
        """As few idle copies as make room for `spec`, those that are worth least; none where its
        revision is here already. Raises ResourceExhaustedError where that is not enough.

        `promised`: what loads will take that have no memory yet is not to be counted as free.
        """
        # A reader that died gives nothing back: its lease has lapsed, and nobody may have noticed.
        self._copies.pool.expire()
        everyone = list(held_here)
        capacity = self._copies.pool.capacity_bytes
        need = slot_bytes(spec.size_bytes)
        if need > capacity:
            raise ResourceExhaustedError(
                "host_pool_bytes", f"{spec.adapter}: {spec.size_bytes} bytes, of {capacity} here"
            )
        if self._copies.has_memory(spec.revision):
            return []
        waiting = self._waiting_bytes(everyone, spec) if promised else 0
        if self._copies.pool.has_room(need) and self._copies.pool.bytes_free >= need + waiting:
            return []
        by_slot: dict[Slot, list[HeldAdapter]] = {}
        for held in everyone:
            if held.copy is not None:
                by_slot.setdefault(held.copy.slot, []).append(held)
        parts = self._parts(by_slot)
        found = victims(parts, need, need + waiting)
        if found is None:
            free = sum(part.length for part in parts if part.free)
            raise ResourceExhaustedError(
                "host_pool_bytes",
                f"{spec.adapter} needs {spec.size_bytes} bytes, {capacity - free + waiting} of "
                f"{capacity} are in use",
                RETRY_AFTER_S,
            )
        evicted = []
        for part in found:
            assert isinstance(part.key, Slot)
            self._age = max(self._age, part.worth[0])
            evicted += [held for held in by_slot[part.key] if not held.leaving]
        return evicted

    def _waiting_bytes(self, everyone: Iterable[HeldAdapter], spec: AdapterSpec) -> int:
        sizes = {
            held.spec.revision: slot_bytes(held.spec.size_bytes)
            for held in everyone
            if held.state == FETCHING and held.copy is None and held.dropping is None
            if not self._copies.has_memory(held.spec.revision)
        }
        sizes.pop(spec.revision, None)
        return sum(sizes.values())

    def _parts(self, by_slot: dict[Slot, list[HeldAdapter]]) -> list[Part]:
        """The arena as eviction sees it. What is being written or still read is missing."""
        parts = []
        for offset, length, slot in self._copies.pool.layout():
            if slot is None:
                parts.append(Part(offset, length, free=True))
                continue
            holders = by_slot.get(slot, [])
            if not holders or not self._copies.is_only_held(slot):
                continue
            if all(held.leaving for held in holders):
                parts.append(Part(offset, length, free=True))
            elif all(held.leaving or held.idle_here for held in holders):
                least = max(self._worth(held) for held in holders)
                parts.append(Part(offset, length, slot, least))
        return parts

    def _worth(self, held: HeldAdapter) -> tuple[float, int]:
        return worth(held.age, self._cost(held), held.spec.size_bytes, held.used)
