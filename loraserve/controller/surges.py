"""Whether demand has left what was placed for so far behind that placement cannot wait for the
interval's end: an adapter that many want at once, or a rank whose adapters together grow."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from loraserve.controller.settings import Settings
from loraserve.placement.arrays import Floats, Ints
from loraserve.placement.columns import Columns
from loraserve.placement.demand import bursts
from loraserve.placement.load import LoadModel
from loraserve.placement.types import AdapterId, AdapterSpec, Demand

SpecOf = Callable[[AdapterId], AdapterSpec | None]


class Recent(NamedTuple):
    """Tokens and samples with prefill of one adapter since the last check."""

    prefill: float = 0.0
    decode: float = 0.0
    requests: int = 0


class Surges:
    """Counts between checks. `plan` is what the last placement was made for."""

    def __init__(self, settings: Settings, load: LoadModel, spec_of: SpecOf) -> None:
        self._settings = settings
        self._load = load
        self._spec_of = spec_of
        self._recent: dict[AdapterId, Recent] = {}
        self._ranks: dict[int, float] = {}
        self.planned: dict[AdapterId, Demand] = {}

    def plan(self, demand: Mapping[AdapterId, Demand], p: Columns) -> None:
        """`p`: the problem that was solved for the demand, with what idle adapters may get."""
        self.planned = dict(demand)
        self._ranks = _by_rank(p.rank, p.alone)

    def count(self, adapter: AdapterId, prefill: float, decode: float) -> None:
        p, d, n = self._recent.get(adapter, _NOTHING)
        self._recent[adapter] = Recent(p + prefill, d + decode, n + (prefill > 0))

    def forget(self, adapter: AdapterId) -> None:
        for known in (self.planned, self._recent):
            known.pop(adapter, None)

    def take(self) -> Mapping[AdapterId, Recent]:
        """The counts, which start anew."""
        recent, self._recent = self._recent, {}
        return recent

    def found(self) -> bool:
        """In the counts since the last check, burst_check_ticks ago."""
        seconds = self._settings.burst_check_ticks * self._settings.tick_seconds
        now = {a: Demand(r.prefill / seconds, r.decode / seconds) for a, r in self._recent.items()}
        return self._of_adapters(now) or self._of_ranks(now)

    def _of_adapters(self, now: Mapping[AdapterId, Demand]) -> bool:
        found = bursts(now, self.planned, self._settings.burst_times)
        _, nodes = self._nodes({a: now[a] for a in found})
        return bool((nodes >= self._settings.burst_nodes).any())

    def _of_ranks(self, now: Mapping[AdapterId, Demand]) -> bool:
        times, least = self._settings.surge_times, self._settings.surge_nodes
        return any(
            nodes > times * (planned := self._ranks.get(rank, 0.0)) and nodes - planned >= least
            for rank, nodes in _by_rank(*self._nodes(now)).items()
        )

    def _nodes(self, demand: Mapping[AdapterId, Demand]) -> tuple[Ints, Floats]:
        """Ranks, and the parts of a node that they take, of the adapters that are registered."""
        known = [(s, d) for a, d in demand.items() if (s := self._spec_of(a)) is not None]
        rank = np.array([s.max_rank for s, _ in known], np.int64)
        charges = self._load.charges(
            np.array([s.size_bytes for s, _ in known], np.int64),
            rank,
            np.array([d.prefill for _, d in known]),
            np.array([d.decode for _, d in known]),
        )
        return rank, charges.alone(rank)


def _by_rank(rank: Ints, nodes: Floats) -> dict[int, float]:
    kinds, of = np.unique(rank, return_inverse=True)
    sums = np.bincount(of, nodes, minlength=len(kinds))
    return dict(zip(kinds.tolist(), sums.tolist(), strict=True))


_NOTHING = Recent()
