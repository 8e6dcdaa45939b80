"""Times between tokens, as a histogram: a run has tens of millions of them."""

import math

# Bins per factor of e: values within a bin differ by less than 1 %.
_BINS = 100
# A run of steps is recorded in parts whose first and last step differ by less than this.
_SPREAD = 0.02


class GapHistogram:
    """Weighted values over 0; percentiles are right to 1 %."""

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}
        self.total = 0.0
        self._sum = 0.0

    def add(self, value: float, weight: float) -> None:
        if weight <= 0:
            return
        key = math.floor(math.log(value) * _BINS) if value > 0 else -(10**6)
        self._weights[key] = self._weights.get(key, 0.0) + weight
        self.total += weight
        self._sum += value * weight

    def add_run(self, first: float, slope: float, count: int, weight: float) -> None:
        """The values first, first + slope, ... of `count` steps, each of that weight."""
        while count > 0:
            part = count
            if slope > 0:
                part = min(count, 1 + int(_SPREAD * first / slope))
            self.add(first + slope * (part - 1) / 2, part * weight)
            first += slope * part
            count -= part

    def percentile(self, percent: float) -> float:
        """0 where nothing was added."""
        left = self.total * percent / 100
        value = 0.0
        for key in sorted(self._weights):
            value = 0.0 if key == -(10**6) else math.exp((key + 0.5) / _BINS)
            left -= self._weights[key]
            if left <= 0:
                break
        return value

    @property
    def mean(self) -> float:
        return self._sum / self.total if self.total else 0.0
