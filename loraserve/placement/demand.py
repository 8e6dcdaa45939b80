"""What each adapter will ask for next: smoothed rates with headroom, and a guess for new adapters.

EWMA with weight 0.8 on the newest window, no trend and no season: on public traces those forecast
worse (`last value` and EWMA 0.7 to 0.9 were best for windows of 1 to 10 minutes). For hot adapters
the mean absolute deviation of the forecast is added. A window costs O(adapters that were active in
it or lately): a rate that fell under the floor is forgotten until the adapter is active again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loraserve.placement.types import AdapterId, Demand

# Of the newest window; the rest of the weight is that of the rate before.
NEWEST_WEIGHT = 0.8
OLDER_WEIGHT = 1 - NEWEST_WEIGHT
# Rates below this, tokens/s, count as none: less than one token in a minute and a half.
FLOOR = 0.01
# An adapter with at least this part of all tokens is hot, and gets headroom.
HOT_PART = 0.01
# Windows during which an adapter that was never used is given the mean of its rank.
PRIOR_WINDOWS = 2
# What one sample may say at most, tokens: more is rubbish.
MOST_TOKENS = 1e15


@dataclass
class _Rate:
    prefill: float = 0.0
    decode: float = 0.0
    deviation: float = 0.0
    """Mean absolute error of the forecast of their sum."""


class DemandTracker:
    """Counts within a window; `demand` changes when a window is closed. `ignored` counts samples
    and times that could not be true."""

    def __init__(self) -> None:
        self.ignored = 0
        self._rates: dict[AdapterId, _Rate] = {}
        self._prefill: dict[AdapterId, float] = {}
        self._decode: dict[AdapterId, float] = {}
        self._ranks: dict[AdapterId, int] = {}
        self._of_rank: dict[int, int] = {}
        self._new: dict[AdapterId, int] = {}
        self._closed_s: float | None = None

    def admit(self, adapter: AdapterId, rank: int) -> None:
        """A new adapter: until it is used, or for PRIOR_WINDOWS, it is given its rank's mean."""
        if adapter in self._ranks:
            self._leave_rank(adapter)
        else:
            self._new[adapter] = PRIOR_WINDOWS
        self._ranks[adapter] = rank
        self._of_rank[rank] = self._of_rank.get(rank, 0) + 1

    def forget(self, adapter: AdapterId) -> None:
        """The adapter left the cluster."""
        if adapter in self._ranks:
            self._leave_rank(adapter)
            del self._ranks[adapter]
        for held in (self._rates, self._prefill, self._decode, self._new):
            held.pop(adapter, None)

    def _leave_rank(self, adapter: AdapterId) -> None:
        rank = self._ranks[adapter]
        self._of_rank[rank] -= 1
        if not self._of_rank[rank]:
            del self._of_rank[rank]

    def add(self, adapter: AdapterId, prefill_tokens: float, decode_tokens: float) -> None:
        """Tokens since the sample before. What is negative, not finite or absurd is ignored."""
        if not (0 <= prefill_tokens <= MOST_TOKENS and 0 <= decode_tokens <= MOST_TOKENS):
            self.ignored += 1
            return
        if prefill_tokens or decode_tokens:
            self._prefill[adapter] = self._prefill.get(adapter, 0.0) + prefill_tokens
            self._decode[adapter] = self._decode.get(adapter, 0.0) + decode_tokens

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
        for adapter in self._prefill:
            self._new.pop(adapter, None)
            self._rates.setdefault(adapter, _Rate())
        gone = []
        for adapter, rate in self._rates.items():
            prefill = self._prefill.get(adapter, 0.0) / seconds
            decode = self._decode.get(adapter, 0.0) / seconds
            error = abs(prefill + decode - rate.prefill - rate.decode)
            # Written out: 100,000 adapters may be active.
            rate.deviation = NEWEST_WEIGHT * error + OLDER_WEIGHT * rate.deviation
            rate.prefill = NEWEST_WEIGHT * prefill + OLDER_WEIGHT * rate.prefill
            rate.decode = NEWEST_WEIGHT * decode + OLDER_WEIGHT * rate.decode
            if rate.prefill + rate.decode < FLOOR:
                gone.append(adapter)
        for adapter in gone:
            del self._rates[adapter]
        self._new = {a: left - 1 for a, left in self._new.items() if left > 1}
        self._prefill, self._decode = {}, {}
        return True

    @property
    def rates(self) -> Mapping[AdapterId, Demand]:
        """Smoothed tokens per second, without headroom, of adapters over the floor."""
        return {a: Demand(r.prefill, r.decode) for a, r in self._rates.items()}

    def demand(self) -> dict[AdapterId, Demand]:
        """What to place for: rates, headroom for the hot, the prior for the new."""
        total = sum(r.prefill + r.decode for r in self._rates.values())
        made = {}
        sums: dict[int, list[float]] = {}
        for adapter, rate in self._rates.items():
            tokens = rate.prefill + rate.decode
            grown = 1.0
            if tokens >= HOT_PART * total:
                grown += rate.deviation / tokens
            made[adapter] = Demand(rate.prefill * grown, rate.decode * grown)
            of_rank = sums.setdefault(self._ranks.get(adapter, 0), [0.0, 0.0])
            of_rank[0] += rate.prefill
            of_rank[1] += rate.decode
        for adapter in self._new:
            if adapter not in made:
                prior = self._prior(adapter, sums)
                if prior.prefill + prior.decode >= FLOOR:
                    made[adapter] = prior
        return made

    def _prior(self, adapter: AdapterId, sums: Mapping[int, list[float]]) -> Demand:
        """The mean of the adapters of its rank; of all, where it is the first of its rank."""
        rank = self._ranks[adapter]
        of_rank = self._of_rank[rank]
        if rank in sums and of_rank > 1:
            prefill, decode = sums[rank]
            return Demand(prefill / (of_rank - 1), decode / (of_rank - 1))
        count = max(1, len(self._ranks) - 1)
        return Demand(
            sum(s[0] for s in sums.values()) / count, sum(s[1] for s in sums.values()) / count
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
