"""Requests over time: arrivals, which adapter, how long. Everything is drawn from a seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraserve.errors import InvalidArgumentError
from loraserve.sim.sequence import Request

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RANKS = (8, 16, 32, 64, 128)
# Of the adapters, by rank.
FALLING_SHARES = (0.30, 0.25, 0.20, 0.15, 0.10)
EQUAL_SHARES = (0.2, 0.2, 0.2, 0.2, 0.2)


@dataclass(frozen=True)
class Workload:
    """Requests in order of time. `adapter` indexes `ranks`; nobody asks for the base alone."""

    name: str
    ranks: tuple[int, ...]
    time_s: Floats
    adapter: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    duration_s: float
    history: "Workload | None" = None
    """What was asked for before time 0; its last moment is time 0."""

    def __post_init__(self) -> None:
        if len(self.time_s) and (np.diff(self.time_s) < 0).any():
            raise InvalidArgumentError("workload", "requests are not in order of time")

    def __len__(self) -> int:
        return len(self.time_s)

    def __iter__(self) -> Iterator[Request]:
        columns = (self.time_s, self.adapter, self.prompt_tokens, self.output_tokens)
        return map(Request._make, zip(*(c.tolist() for c in columns), strict=True))

    @property
    def adapter_names(self) -> list[str]:
        return [f"a{index:05d}-r{rank}" for index, rank in enumerate(self.ranks)]


def check_positive(**values: float) -> None:
    """Raises InvalidArgumentError that names the value."""
    for name, value in values.items():
        if not (np.isfinite(value) and value > 0):
            raise InvalidArgumentError(name, f"{value} is not over 0")


def gamma_arrivals(rng: np.random.Generator, rate: float, duration_s: float, cv: float) -> Floats:
    """Times of a renewal process with Gamma gaps; cv 1 is Poisson."""
    check_positive(rate=rate, duration_s=duration_s, cv=cv)
    shape, scale = 1 / cv**2, cv**2 / rate
    times = np.empty(0)
    last = 0.0
    while last < duration_s:
        more = int((duration_s - last) * rate * 1.1) + 64
        times = np.concatenate([times, last + np.cumsum(rng.gamma(shape, scale, more))])
        last = float(times[-1])
    return times[times < duration_s]


def zipf_shares(count: int, exponent: float) -> Floats:
    """Of the total, the most popular first; exponent 0 is uniform."""
    weights = np.arange(1, count + 1, dtype=float) ** -exponent
    return np.asarray(weights / weights.sum())


def power_indices(rng: np.random.Generator, adapters: int, alpha: float, size: int) -> Ints:
    """Adapters as S-LoRA's benchmark draws them: floor(N * U**(1/alpha)).

    The trap: alpha = 1 is uniform and smaller is more skewed. With 200 adapters the first gets 0.5,
    4, 20 and 59 % at alpha 1, 0.6, 0.3 and 0.1; and there it is of the largest rank, so that skew
    and rank are confounded.
    """
    check_positive(alpha=alpha)
    return np.minimum((adapters * rng.power(alpha, size)).astype(np.int64), adapters - 1)


def ranks_by_share(
    rng: np.random.Generator, count: int, shares: Sequence[float] = FALLING_SHARES
) -> tuple[int, ...]:
    """Ranks of the adapters: as many of each as its share says, in random order."""
    bounds = np.round(np.cumsum(shares) * count).astype(int)
    ranks = np.repeat(RANKS, np.diff(np.concatenate([[0], bounds])))
    return tuple(int(r) for r in rng.permutation(ranks))
