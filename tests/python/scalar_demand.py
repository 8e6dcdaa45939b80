"""The demand tracker one adapter at a time, as its docstring says it: what the one that works on
columns is compared with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loraserve.placement.demand import (
    FLOOR,
    HOT_PART,
    LEAST_REQUESTS,
    LEAST_UNSEEN,
    MOST_UNSEEN,
    PRIOR_WINDOWS,
)
from loraserve.placement.rates import HALF_TRUSTED, LEAST_WEIGHT, NEWEST_WEIGHT, SURPRISE
from loraserve.placement.shrinkage import shrunk
from loraserve.placement.types import AdapterId, Demand


@dataclass
class _Rate:
    prefill: float = 0.0
    decode: float = 0.0
    deviation: float = 0.0
    """Mean absolute error of the forecast of their sum."""
    requests: float = 0.0
    """In a usual window: samples with prefill, so at most one for each node and heartbeat."""
    seen: float = 0.0
    """Requests that the rates rest on: a count whose weights fall as those of the rates do."""

    def update(
        self, prefill: float, decode: float, requests: int, scale: float, part: float
    ) -> None:
        """By the tokens/s of a window that is this part of a usual one, and its requests; `scale`
        makes the forecast of the rate."""
        tokens, before = prefill + decode, self.prefill + self.decode
        self.deviation = _smooth(self.deviation, abs(tokens - scale * before))
        weight = self._weight(tokens, before, part)
        self.prefill = _smooth(self.prefill, prefill, weight)
        self.decode = _smooth(self.decode, decode, weight)
        self.requests = _smooth(self.requests, requests / part, weight)
        self.seen = (1 - weight) * self.seen + requests

    def _weight(self, tokens: float, before: float, part: float) -> float:
        """Of a window with so many tokens/s."""
        if not before or not self.requests:
            return NEWEST_WEIGHT
        expected = self.requests * part
        # In requests of the usual size; n of them are off by sqrt(n).
        came = expected * tokens / before
        if abs(came - expected) > SURPRISE * math.sqrt(max(1.0, expected)):
            return NEWEST_WEIGHT
        trusted = NEWEST_WEIGHT * expected / (expected + HALF_TRUSTED)
        return max(LEAST_WEIGHT * part, trusted)


class ScalarDemand:
    def __init__(self, window_s: float = 0.0) -> None:
        """`window_s`: the length of a usual window; shorter ones say less of single adapters. 0:
        all are usual."""
        self._window_s = window_s
        self._rates: dict[AdapterId, _Rate] = {}
        self._prefill: dict[AdapterId, float] = {}
        self._decode: dict[AdapterId, float] = {}
        self._requests: dict[AdapterId, int] = {}
        self._rank_rates: dict[int, Demand] = {}
        self._unseen: dict[int, float] = {}
        self._factors: dict[AdapterId, float] = {}
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
        self._of_rank[rank] = self._of_rank.get(rank, 0) + 1

    def forget(self, adapter: AdapterId) -> None:
        """The adapter left the cluster."""
        if adapter in self._ranks:
            self._leave_rank(adapter)
            del self._ranks[adapter]
        for held in (self._rates, self._prefill, self._decode, self._requests, self._new):
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
        if prefill_tokens or decode_tokens:
            self._prefill[adapter] = self._prefill.get(adapter, 0.0) + prefill_tokens
            self._decode[adapter] = self._decode.get(adapter, 0.0) + decode_tokens
            if requests is None:
                requests = int(prefill_tokens > 0)
            self._requests[adapter] = self._requests.get(adapter, 0) + requests

    def close_window(self, now_s: float) -> bool:
        """Folds the counts since the last call into the rates. Whether it did: the first call only
        starts the clock, and a time that does not rise is ignored, its counts kept."""
        last = self._closed_s
        self._closed_s = now_s
        if last is None:
            return False
        seconds = now_s - last
        part = min(1.0, seconds / self._window_s) if self._window_s else 1.0
        factors = self._factors
        first_seen = [a for a in self._prefill if a not in self._rates]
        for adapter in self._prefill:
            self._new.pop(adapter, None)
            self._rates.setdefault(adapter, _Rate())
        gone = []
        of_rank: dict[int, list[float]] = {}
        for adapter, rate in self._rates.items():
            prefill = self._prefill.get(adapter, 0.0) / seconds
            decode = self._decode.get(adapter, 0.0) / seconds
            requests = self._requests.get(adapter, 0)
            rank = self._ranks.get(adapter, 0)
            rate.update(prefill, decode, requests, factors.get(adapter, 1.0), part)
            if rate.prefill + rate.decode < FLOOR or (
                rate.requests < LEAST_REQUESTS and adapter not in self._prefill
            ):
                gone.append(adapter)
            sums = of_rank.setdefault(rank, [0.0, 0.0])
            sums[0] += prefill
            sums[1] += decode
        self._note_unseen(first_seen, of_rank, seconds)
        for adapter in gone:
            del self._rates[adapter]
        none = Demand()
        self._rank_rates = {
            rank: Demand(_smooth(old.prefill, prefill), _smooth(old.decode, decode))
            for rank, (prefill, decode) in of_rank.items()
            for old in [self._rank_rates.get(rank, none)]
        }
        self._new = {a: left - part for a, left in self._new.items() if left > part}
        self._prefill, self._decode, self._requests = {}, {}, {}
        self._factors = self._forecast()
        return True

    def _note_unseen(
        self, first_seen: list[AdapterId], of_rank: Mapping[int, list[float]], seconds: float
    ) -> None:
        once: dict[int, float] = {}
        for adapter in first_seen:
            if self._requests.get(adapter, 0) == 1:
                tokens = self._prefill[adapter] + self._decode[adapter]
                rank = self._ranks.get(adapter, 0)
                once[rank] = once.get(rank, 0.0) + tokens / seconds
        for rank, sums in of_rank.items():
            part = once.get(rank, 0.0) / max(sum(sums), FLOOR)
            self._unseen[rank] = _smooth(self._unseen.get(rank, part), part)

    def _idle_parts(self) -> dict[int, tuple[float, int]]:
        """By rank: the part of its tokens that its idle adapters share, and their number."""
        idle = dict(self._of_rank)
        for adapter in (*self._rates, *self._new):
            rank = self._ranks.get(adapter)
            if rank is not None:
                idle[rank] -= 1
        return {
            rank: (min(part, MOST_UNSEEN), idle[rank])
            for rank, part in self._unseen.items()
            if part >= LEAST_UNSEEN and idle.get(rank, 0) > 0
        }

    def _forecast(self) -> dict[AdapterId, float]:
        """By adapter: what its rate is multiplied with. Rates are drawn to what is usual for their
        rank, and sum to the rank's, less what idle adapters are expected to get."""
        held = self._rates.values()
        tokens = np.array([r.prefill + r.decode for r in held])
        rank = np.array([self._ranks.get(a, 0) for a in self._rates], np.int64)
        factor = shrunk(
            tokens,
            np.array([r.requests for r in held]),
            np.array([r.seen for r in held]),
            rank,
        )
        unseen = self._idle_parts()
        for value in set(rank.tolist()):
            known = self._rank_rates.get(value, Demand())
            part, _ = unseen.get(value, (0.0, 0))
            of_rank = rank == value
            total = float((tokens * factor)[of_rank].sum())
            if total > 0:
                factor[of_rank] *= (1 - part) * (known.prefill + known.decode) / total
        return dict(zip(self._rates, factor.tolist(), strict=True))

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
        factors = self._factors
        return {
            a: Demand(r.prefill * factors[a], r.decode * factors[a]) for a, r in self._rates.items()
        }

    def demand(self) -> dict[AdapterId, Demand]:
        """What to place for: rates, headroom for the hot, the prior for the new."""
        rates = self.rates
        total = sum(r.prefill + r.decode for r in rates.values())
        made = {}
        sums: dict[int, list[float]] = {}
        for adapter, rate in rates.items():
            tokens = rate.prefill + rate.decode
            grown = 1.0
            if tokens > 0 and tokens >= HOT_PART * total:
                grown += self._rates[adapter].deviation / tokens
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


def _smooth(old: float, newest: float, weight: float = NEWEST_WEIGHT) -> float:
    return weight * newest + (1 - weight) * old
