"""Smoothed rates of the adapters that were active lately, as columns: a window of 100,000 is folded
in within milliseconds."""

from collections.abc import Collection, Iterable, Mapping
from itertools import compress, repeat
from typing import Any

import numpy as np

from loraserve.placement.arrays import Bools, Floats, Ints
from loraserve.placement.types import AdapterId

# Of the newest window, for an adapter with many requests in it and for sums over ranks; the rest of
# the weight is that of the rate before.
NEWEST_WEIGHT = 0.8
# An adapter with so many requests in a window gives the newest one half of that weight: what few
# requests say is mostly chance. None gives it less than LEAST_WEIGHT.
HALF_TRUSTED = 10.0
LEAST_WEIGHT = 0.1
# So many standard deviations of a Poisson count from the forecast are no chance: full weight.
SURPRISE = 6.0
# The rank of adapters that nobody has told.
UNKNOWN = -1

# prefill, decode: tokens/s. deviation: mean absolute error of the forecast of their sum. requests:
# in a usual window; samples with prefill, so at most one for each node and heartbeat. seen: the
# requests that all this rests on, with weights that fall as those of the rates do. factor: makes
# the forecast of the rates.
_ROW = np.dtype(
    [
        ("prefill", np.float64),
        ("decode", np.float64),
        ("deviation", np.float64),
        ("requests", np.float64),
        ("seen", np.float64),
        ("factor", np.float64),
        ("rank", np.int64),
    ]
)


class Rates:
    """One row for each adapter, in the order in which they became active."""

    def __init__(self) -> None:
        self._adapters: list[AdapterId] = []
        self._row: dict[AdapterId, int] = {}
        self._table = np.zeros(0, _ROW)
        # Rows whose adapters left; they go when the rows are looked at next.
        self._left: list[int] = []

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, adapter: AdapterId) -> bool:
        return adapter in self._row

    @property
    def adapters(self) -> list[AdapterId]:
        """By row; not to be changed."""
        self._settle()
        return self._adapters

    def column(self, name: str) -> Any:
        """[rows]: a view."""
        self._settle()
        return self._table[name]

    @property
    def tokens(self) -> Floats:
        """[rows]: per second, of both kinds."""
        return np.asarray(self.column("prefill") + self.column("decode"))

    @property
    def rank(self) -> Ints:
        """[rows]: 0 where it is not known."""
        return np.maximum(np.asarray(self.column("rank"), np.int64), 0)

    def told_rank(self, adapter: AdapterId, rank: int) -> None:
        row = self._row.get(adapter)
        if row is not None:
            self._table["rank"][row] = rank

    def forget(self, adapter: AdapterId) -> None:
        row = self._row.pop(adapter, None)
        if row is not None:
            self._left.append(row)

    def rows(self, adapters: Collection[AdapterId], ranks: Mapping[AdapterId, int]) -> Ints:
        """Of each adapter, made where it has none: after all others, in the order given."""
        self._settle()
        before = len(self._adapters)
        rows = np.fromiter(map(self._row.get, adapters, repeat(-1)), np.int64, len(adapters))
        new = list(compress(adapters, (rows < 0).tolist()))
        rows[rows < 0] = made = np.arange(before, before + len(new))
        self._row.update(zip(new, made.tolist(), strict=True))
        self._adapters += new
        table = np.zeros(len(new), _ROW)
        table["factor"] = 1.0
        table["rank"] = [ranks.get(a, UNKNOWN) for a in new]
        self._table = np.concatenate([self._table, table])
        return rows

    def spread(self, rows: Ints, counts: Iterable[float]) -> Floats:
        """[rows]: the counts of these rows, 0 for the others."""
        out = np.zeros(len(self._adapters))
        out[rows] = np.fromiter(counts, np.float64, len(rows))
        return out

    def update(self, prefill: Floats, decode: Floats, requests: Floats, part: float) -> None:
        """[rows]: by the tokens/s and requests of a window that is this part of a usual one."""
        t, tokens, before = self._table, prefill + decode, self.tokens
        t["deviation"] = smooth(t["deviation"], np.abs(tokens - t["factor"] * before))
        weight = _weight(tokens, before, t["requests"] * part, part)
        t["prefill"] = smooth(t["prefill"], prefill, weight)
        t["decode"] = smooth(t["decode"], decode, weight)
        t["requests"] = smooth(t["requests"], requests / part, weight)
        t["seen"] = (1 - weight) * t["seen"] + requests

    def keep(self, wanted: Bools) -> None:
        """[rows]: forgets the others."""
        if not wanted.all():
            self._adapters = list(compress(self._adapters, wanted.tolist()))
            self._row = dict(zip(self._adapters, range(len(self._adapters)), strict=True))
            self._table = self._table[wanted]

    def _settle(self) -> None:
        if self._left:
            wanted = np.ones(len(self._adapters), np.bool_)
            wanted[self._left] = False
            self._left = []
            self.keep(wanted)


def _weight(tokens: Floats, before: Floats, expected: Floats, part: float) -> Floats:
    """[rows]: of a window with so many tokens/s, where so many requests were expected."""
    with np.errstate(divide="ignore", invalid="ignore"):
        # In requests of the usual size; n of them are off by sqrt(n).
        came = expected * tokens / before
        surprised = np.abs(came - expected) > SURPRISE * np.sqrt(np.maximum(1.0, expected))
    trusted = np.maximum(LEAST_WEIGHT * part, NEWEST_WEIGHT * expected / (expected + HALF_TRUSTED))
    return np.where((before == 0) | (expected == 0) | surprised, NEWEST_WEIGHT, trusted)


def smooth(old: Any, newest: Any, weight: Any = NEWEST_WEIGHT) -> Any:
    """Numbers or columns."""
    return weight * newest + (1 - weight) * old
