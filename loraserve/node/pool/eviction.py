"""Which copies leave a host pool so that another fits. Pure: no clock, no memory of its own.

GreedyDual-Size: a copy is worth `age + cost / size`, where the cost is the seconds it takes to get
it back and `age` is the pool's age when it was last used. The pool's age is the highest worth that
was ever evicted, so a copy that is not used again is overtaken by all that are, however dear it
was once. Among equals the one goes that was used longest ago.
"""

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A piece of the arena: free, a copy that may go (`key` and `worth`), or one that may not."""

    offset: int
    length: int
    key: Hashable | None = None
    """Of a copy that may go."""
    worth: tuple[float, int] = (0.0, 0)
    """(GreedyDual-Size worth, number of its last use); the lowest goes first."""
    free: bool = False


def worth(age: float, cost_s: float, size_bytes: int, used: int) -> tuple[float, int]:
    """Of a copy whose last use had the number `used`, when the pool had the `age`."""
    return age + cost_s / max(1, size_bytes), used


def victims(parts: Sequence[Part], need_bytes: int, free_bytes: int) -> list[Part] | None:
    """Copies to evict, the least worth first, so that one piece of `need_bytes` is free and
    `free_bytes` are in all; None where even all of them are not enough.

    `parts`: by offset. Considers the k least worthy copies for the smallest k that does; of them it
    takes those of the piece that costs least, and of the others as many as `free_bytes` asks for.
    """
    runs = _Runs()
    for part in parts:
        if part.free:
            runs.add(part)
    order = [(p.worth, p.offset, p) for p in parts if p.key is not None]
    heapq.heapify(order)
    taken: list[Part] = []
    while runs.longest < need_bytes or runs.total < free_bytes:
        if not order:
            return None
        taken.append(heapq.heappop(order)[2])
        runs.add(taken[-1])
    chosen = _cheapest_piece(parts, {p.offset for p in taken}, need_bytes)
    total = sum(p.length for p in parts if p.free) + sum(p.length for p in chosen)
    for part in taken:
        if total >= free_bytes:
            break
        if part not in chosen:
            chosen.append(part)
            total += part.length
    return sorted(chosen, key=lambda p: p.worth)


class _Runs:
    """Neighbouring parts, joined. Their number costs nothing: only their ends are kept."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}  # by their beginnings
        self._begins: dict[int, int] = {}  # by their ends
        self.longest = self.total = 0

    def add(self, part: Part) -> None:
        begin, end = part.offset, part.offset + part.length
        begin = self._begins.pop(begin, begin)
        end = self._ends.pop(end, end)
        self._ends[begin], self._begins[end] = end, begin
        self.total += part.length
        self.longest = max(self.longest, end - begin)


def _cheapest_piece(parts: Sequence[Part], taken: set[int], need_bytes: int) -> list[Part]:
    """The copies in that run of neighbours with `need_bytes` whose copies are worth least in sum,
    weighed by their size: the seconds that getting them back takes."""
    best: tuple[float, int] | None = None
    chosen: list[Part] = []
    window: list[Part] = []
    length, cost, begin = 0, 0.0, 0
    for part in parts:
        usable = part.free or part.offset in taken
        if not usable or (window and window[-1].offset + window[-1].length != part.offset):
            window, begin, length, cost = [], 0, 0, 0.0
        if not usable:
            continue
        window.append(part)
        length += part.length
        cost += _cost(part)
        while length - window[begin].length >= need_bytes:
            length -= window[begin].length
            cost -= _cost(window[begin])
            begin += 1
        if length >= need_bytes:
            last = max((p.worth[1] for p in window[begin:] if p.key is not None), default=0)
            if best is None or (cost, last) < best:
                best = (cost, last)
                chosen = [p for p in window[begin:] if p.key is not None]
    return chosen


def _cost(part: Part) -> float:
    return part.worth[0] * part.length if part.key is not None else 0.0
