"""A histogram that costs a token little: prometheus_client's own is most of a token's budget."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client.core import HistogramMetricFamily


class Buckets:
    """Written by one thread; a reader in another sees it a moment old."""

    __slots__ = ("_bounds", "_counts", "count", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: the largest value of each bucket but the last, rising."""
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.count += 1
        self.sum += value

    def family(
        self, name: str, about: str, labels: Mapping[str, str] | None = None
    ) -> HistogramMetricFamily:
        """As Prometheus wants it: counts of all up to each bound."""
        total = 0
        buckets: list[tuple[str, float]] = []
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        for bound, count in zip(bounds, self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        labels = labels or {}
        family = HistogramMetricFamily(name, about, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self.sum)
        return family
