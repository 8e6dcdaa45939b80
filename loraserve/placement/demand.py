"""What each adapter will ask for next: smoothed rates with headroom, and a guess for new adapters.

EWMA with weight 0.8 on the newest window, less for adapters with few requests; no trend and no
season: on public traces those forecast worse (`last value` and EWMA 0.7 to 0.9 were best for
windows of 1 to 10 minutes). For hot adapters the mean absolute deviation of the forecast is added.
A window costs O(adapters that were active in it or lately): a rate that fell under the floor, or
rests on next to no requests, is forgotten until the adapter is active again.
"""

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from loraserve.placement.arrays import Floats
from loraserve.placement.rates import UNKNOWN, Rates, smooth
from loraserve.placement.shrinkage import shrunk
from loraserve.placement.types import AdapterId, Demand

# Rates below this, tokens/s, count as none: less than one token in a minute and a half.
FLOOR = 0.01
# An adapter with at least this part of all tokens is hot, and gets headroom.
HOT_PART = 0.01
# Windows during which an adapter that was never used is given the mean of its rank.
PRIOR_WINDOWS = 2
# An adapter with fewer requests in a window than this, and none in the newest, is idle again.
LEAST_REQUESTS = 0.05
# Below this part of a rank's tokens, what its idle adapters will get is not worth a thought; above
# the other, the estimate is not believed.
LEAST_UNSEEN, MOST_UNSEEN = 0.02, 0.9
# What one sample may say at most, tokens: more is rubbish.
MOST_TOKENS = 1e15


class DemandTracker:
    """Counts within a window; `demand` changes when a window is closed. `ignored` counts samples
    and times that could not be true.

    Adapters with few requests are smoothed long and drawn to their rank's mean (`shrinkage`), the
    sum of each rank's adapters is smoothed briefly, and the adapters' rates are scaled to it: what
    follows a shift between ranks within a window does not follow the chance of single adapters.
    Idle adapters share what a rank's tokens will go to adapters that are idle now: the tokens of
    those seen for the first time, and once, in the newest window (Good, The population frequencies
    of species, Biometrika 40, 1953)."""

    def __init__(self, window_s: float = 0.0) -> None:
        """`window_s`: the length of a usual window; shorter ones say less of single adapters. 0:
        all are usual."""
        self.ignored = 0
        self._window_s = window_s
        self._rates = Rates()
        self._prefill: dict[AdapterId, float] = {}
        self._decode: dict[AdapterId, float] = {}
        self._requests: dict[AdapterId, int] = {}
        self._rank_rates: dict[int, Demand] = {}
        self._unseen: dict[int, float] = {}
        self._ranks: dict[AdapterId, int] = {}
        self._of_rank: dict[int, int] = {}
        self._new: dict[AdapterId, float] = {}
        self._closed_s: float | None = None

    def admit(self, adapter: AdapterId, rank: int) -> None:
        """A new adapter: until it is used, or for PRIOR_WINDOWS, it is given its rank's mean."""
        if adapter in self._ranks:
            self._leave_rank(adapter)
        else:
            self._new[adapter] = PRIOR_WINDOWS
        self._ranks[adapter] = rank
        self._rates.told_rank(adapter, rank)
        self._of_rank[rank] = self._of_rank.get(rank, 0) + 1

    def forget(self, adapter: AdapterId) -> None:
        """The adapter left the cluster."""
        if adapter in self._ranks:
            self._leave_rank(adapter)
            del self._ranks[adapter]
        self._rates.forget(adapter)
        for held in (self._prefill, self._decode, self._requests, self._new):
            held.pop(adapter, None)

    def _leave_rank(self, adapter: AdapterId) -> None:
        rank = self._ranks[adapter]
        self._of_rank[rank] -= 1
        if not self._of_rank[rank]:
            del self._of_rank[rank]

    def add(
        self,
        adapter: AdapterId,
        prefill_tokens: float,
        decode_tokens: float,
        requests: int | None = None,
    ) -> None:
        """Tokens since the sample before; of one request, where there is prefill, unless `requests`
        says how many. What is negative, not finite or absurd is ignored."""
        if not (0 <= prefill_tokens <= MOST_TOKENS and 0 <= decode_tokens <= MOST_TOKENS):
            self.ignored += 1
            return
        if prefill_tokens or decode_tokens:
            self._prefill[adapter] = self._prefill.get(adapter, 0.0) + prefill_tokens
            self._decode[adapter] = self._decode.get(adapter, 0.0) + decode_tokens
            if requests is None:
                requests = int(prefill_tokens > 0)
            self._requests[adapter] = self._requests.get(adapter, 0) + requests

    @property
    def closed_s(self) -> float:
        """When the last window ended."""
        return -math.inf if self._closed_s is None else self._closed_s

    def close_window(self, now_s: float) -> bool:
        """Folds the counts since the last call into the rates. Whether it did: the first call only
        starts the clock, and a time that does not rise is ignored, its counts kept."""
        last = self._closed_s
        if not math.isfinite(now_s) or (last is not None and now_s <= last):
            self.ignored += 1
            return False
        self._closed_s = now_s
        if last is None:
            return False
        seconds = now_s - last
        part = min(1.0, seconds / self._window_s) if self._window_s else 1.0
        rates = self._rates
        known = len(rates)
        # The three have the same adapters in the same order.
        rows = rates.rows(self._prefill, self._ranks)
        prefill = rates.spread(rows, self._prefill.values()) / seconds
        decode = rates.spread(rows, self._decode.values()) / seconds
        requests = rates.spread(rows, self._requests.values())
        rates.update(prefill, decode, requests, part)
        kinds, of = np.unique(rates.rank, return_inverse=True)
        sums = [np.bincount(of, column, len(kinds)) for column in (prefill, decode)]
        once = np.where(requests == 1, prefill + decode, 0.0)
        once[:known] = 0.0
        newcomers = np.bincount(of, once, len(kinds)) / np.maximum(sums[0] + sums[1], FLOOR)
        self._note_unseen(kinds.tolist(), newcomers.tolist())
        none, before = Demand(), self._rank_rates
        self._rank_rates = {
            rank: Demand(smooth(old.prefill, prefill), smooth(old.decode, decode))
            for rank, prefill, decode in zip(
                kinds.tolist(), sums[0].tolist(), sums[1].tolist(), strict=True
            )
            for old in [before.get(rank, none)]
        }
        wanted = rates.column("requests") >= LEAST_REQUESTS
        wanted[rows] = True
        rates.keep(wanted & (rates.tokens >= FLOOR))
        self._new = {
            a: left - part
            for a, left in self._new.items()
            if left > part and a not in self._prefill
        }
        self._prefill, self._decode, self._requests = {}, {}, {}
        rates.column("factor")[:] = self._forecast()
        return True

    def _note_unseen(self, ranks: list[int], newcomers: list[float]) -> None:
        """`newcomers`: the part of each rank's tokens that adapters got which were seen for the
        first time, and once."""
        for rank, part in zip(ranks, newcomers, strict=True):
            self._unseen[rank] = smooth(self._unseen.get(rank, part), part)

    def _idle_parts(self) -> dict[int, tuple[float, int]]:
        """By rank: the part of its tokens that its idle adapters share, and their number."""
        idle = Counter(self._of_rank)
        ranks = self._rates.column("rank")
        kinds, counts = np.unique(ranks[ranks != UNKNOWN], return_counts=True)
        idle.subtract(dict(zip(kinds.tolist(), counts.tolist(), strict=True)))
        idle.subtract(Counter(self._ranks[a] for a in self._new))
        return {
            rank: (min(part, MOST_UNSEEN), idle[rank])
            for rank, part in self._unseen.items()
            if part >= LEAST_UNSEEN and idle[rank] > 0
        }

    def _forecast(self) -> Floats:
        """[rows]: what rates are multiplied with. Rates are drawn to what is usual for their rank,
        and sum to the rank's, less what idle adapters are expected to get."""
        rates, rank = self._rates, self._rates.rank
        tokens = rates.tokens
        factor = shrunk(tokens, rates.column("requests"), rates.column("seen"), rank)
        unseen = self._idle_parts()
        for value in np.unique(rank).tolist():
            known = self._rank_rates.get(value, Demand())
            part, _ = unseen.get(value, (0.0, 0))
            of_rank = rank == value
            total = float((tokens * factor)[of_rank].sum())
            if total > 0:
                factor[of_rank] *= (1 - part) * (known.prefill + known.decode) / total
        return factor

    def idle(self) -> dict[int, Demand]:
        """By rank: what each of its adapters that `demand` does not name is expected to get; ranks
        without are left out."""
        found = {}
        for rank, (part, count) in self._idle_parts().items():
            known = self._rank_rates.get(rank, Demand())
            found[rank] = Demand(known.prefill * part / count, known.decode * part / count)
        return found

    @property
    def rates(self) -> Mapping[AdapterId, Demand]:
        """Smoothed tokens per second, without headroom, of adapters over the floor."""
        return self._demands(*self._forecasts())

    def _forecasts(self) -> tuple[Floats, Floats]:
        """[rows], prefill and decode."""
        factor = self._rates.column("factor")
        return self._rates.column("prefill") * factor, self._rates.column("decode") * factor

    def _demands(self, prefill: Floats, decode: Floats) -> dict[AdapterId, Demand]:
        pairs = zip(prefill.tolist(), decode.tolist(), strict=True)
        return dict(zip(self._rates.adapters, map(Demand._make, pairs), strict=True))

    def demand(self) -> dict[AdapterId, Demand]:
        """What to place for: rates, headroom for the hot, the prior for the new."""
        prefill, decode = self._forecasts()
        tokens = prefill + decode
        hot = (tokens > 0) & (tokens >= HOT_PART * tokens.sum())
        grown = np.ones(len(tokens))
        grown[hot] += self._rates.column("deviation")[hot] / tokens[hot]
        made = self._demands(prefill * grown, decode * grown)
        kinds, of = np.unique(self._rates.rank, return_inverse=True)
        sums = [np.bincount(of, column, len(kinds)).tolist() for column in (prefill, decode)]
        of_rank = dict(zip(kinds.tolist(), map(Demand._make, zip(*sums, strict=True)), strict=True))
        priors = {rank: self._prior(rank, of_rank) for rank in self._of_rank}
        for adapter in self._new:
            prior = priors[self._ranks[adapter]]
            if adapter not in made and prior.prefill + prior.decode >= FLOOR:
                made[adapter] = prior
        return made

    def _prior(self, rank: int, sums: Mapping[int, Demand]) -> Demand:
        """The mean of the rank's adapters; of all, for the first of its rank."""
        others = self._of_rank[rank] - 1
        if rank in sums and others:
            prefill, decode = sums[rank]
            return Demand(prefill / others, decode / others)
        count = max(1, len(self._ranks) - 1)
        return Demand(
            sum(s.prefill for s in sums.values()) / count,
            sum(s.decode for s in sums.values()) / count,
        )


def bursts(
    now: Mapping[AdapterId, Demand],
    planned: Mapping[AdapterId, Demand],
    times: float = 4.0,
    at_least: float = 1.0,
) -> list[AdapterId]:
    """Adapters whose demand is `times` what was planned for and at least `at_least` tokens/s over
    it: a reason to place at once, before the interval ends."""
    none = Demand()
    found = []
    for adapter, demand in now.items():
        tokens = demand.prefill + demand.decode
        before = planned.get(adapter, none)
        expected = before.prefill + before.decode
        if tokens > times * expected and tokens - expected >= at_least:
            found.append(adapter)
    return sorted(found)
