"""The suite of workloads, W1 to W7, and S-LoRA's, by name. Ours: how popularity, ranks and time
play together is what the policies differ in.

Ranks are independent of popularity unless a workload is about that. Shares of ranks fall from 30 %
at rank 8 to 10 % at rank 128, but in W1 and W4, where they are equal.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from loraserve.errors import InvalidArgumentError
from loraserve.sim.lengths import sample_lengths
from loraserve.sim.servegen import servegen
from loraserve.sim.traces import Trace
from loraserve.sim.workload import (
    EQUAL_SHARES,
    RANKS,
    Floats,
    Ints,
    Workload,
    check_positive,
    gamma_arrivals,
    power_indices,
    ranks_by_share,
    zipf_shares,
)

# W4: shares of the requests by rank, at the start; at the end they are the other way round.
DRIFT_SHARES = (0.60, 0.20, 0.10, 0.06, 0.04)
# Of the adapters of a long tail, by rank.
TAIL_SHARES = (0.60, 0.20, 0.10, 0.06, 0.04)
ONE_RANK = 16
# So long before time 0 are requests known: the controller has been up.
HISTORY_S = 240.0
FLASH_FACTOR = 50
FLASH_S = 300.0
# S-LoRA's setting S2: rank by index, round robin, the first the largest.
SLORA_RANKS = (64, 32, 16, 8)


@dataclass(frozen=True)
class WorkloadOptions:
    """`rate`: requests/s of the whole cluster, on average. `cv`: of the times between requests.
    `lengths`: see sim.lengths. `alpha`: of S-LoRA's popularity only."""

    adapters: int = 100
    rate: float = 10.0
    duration_s: float = 600.0
    seed: int = 0
    cv: float = 1.0
    lengths: str = "azure_conv"
    alpha: float = 1.0


Options = WorkloadOptions


def _requests(
    name: str,
    options: Options,
    rng: np.random.Generator,
    ranks: tuple[int, ...],
    choose: Callable[[Floats], Ints],
) -> Workload:
    """`choose` gives adapters for times; what is asked for at time 0 has been so for HISTORY_S."""

    def drawn(times: Floats, seconds: float, when: Floats, before: Workload | None) -> Workload:
        prompt, output = sample_lengths(options.lengths, rng, len(times))
        return Workload(name, ranks, times, choose(when), prompt, output, seconds, before)

    past = gamma_arrivals(rng, options.rate, HISTORY_S, options.cv)
    history = drawn(past, HISTORY_S, np.zeros_like(past), None)
    times = gamma_arrivals(rng, options.rate, options.duration_s, options.cv)
    return drawn(times, options.duration_s, times, history)


def _popular(rng: np.random.Generator, shares: Floats) -> Callable[[Floats], Ints]:
    return lambda times: rng.choice(len(shares), len(times), p=shares)


def _uniform(o: Options, rng: np.random.Generator) -> Workload:
    ranks = ranks_by_share(rng, o.adapters, EQUAL_SHARES)
    return _requests("uniform", o, rng, ranks, _popular(rng, zipf_shares(o.adapters, 0)))


def _zipf(o: Options, rng: np.random.Generator) -> Workload:
    ranks = ranks_by_share(rng, o.adapters)
    return _requests("zipf", o, rng, ranks, _popular(rng, zipf_shares(o.adapters, 1)))


def _long_tail(o: Options, rng: np.random.Generator) -> Workload:
    """Nobody is popular, most are small: a step meets as many adapters as it has requests."""
    ranks = ranks_by_share(rng, o.adapters, TAIL_SHARES)
    return _requests("long_tail", o, rng, ranks, _popular(rng, zipf_shares(o.adapters, 0)))


def _one_rank(o: Options, rng: np.random.Generator) -> Workload:
    """Nothing for a rank-aware policy to do."""
    ranks = (ONE_RANK,) * o.adapters
    return _requests("one_rank", o, rng, ranks, _popular(rng, zipf_shares(o.adapters, 1)))


def _hot(name: str, rank: int) -> "Maker":
    def make(o: Options, rng: np.random.Generator) -> Workload:
        # Every adapter of the rank is more popular than any other.
        ranks = tuple(sorted(ranks_by_share(rng, o.adapters), key=lambda r: r != rank))
        return _requests(name, o, rng, ranks, _popular(rng, zipf_shares(o.adapters, 1)))

    return make


def _drift(name: str, progress: Callable[[Floats], Floats]) -> "Maker":
    """`progress`: 0 for the shares of the start, 1 for those of the end."""

    def make(o: Options, rng: np.random.Generator) -> Workload:
        ranks = ranks_by_share(rng, o.adapters, EQUAL_SHARES)
        members = [np.flatnonzero(np.array(ranks) == rank) for rank in RANKS]
        if not all(len(m) for m in members):
            raise InvalidArgumentError("adapters", f"{o.adapters}: at least {len(RANKS)} for drift")
        start, end = np.cumsum(DRIFT_SHARES), np.cumsum(DRIFT_SHARES[::-1])

        def choose(times: Floats) -> Ints:
            x = progress(times / o.duration_s)[:, None]
            of_rank = (rng.random(len(times))[:, None] > (1 - x) * start + x * end).sum(axis=1)
            adapter = np.zeros(len(times), dtype=np.int64)
            for index, group in enumerate(members):
                chosen = of_rank == index
                shares = zipf_shares(len(group), 1)
                adapter[chosen] = rng.choice(group, int(chosen.sum()), p=shares)
            return adapter

        return _requests(name, o, rng, ranks, choose)

    return make


def flash_window(duration_s: float) -> tuple[float, float]:
    """When the flash crowd comes and goes."""
    return duration_s / 3, duration_s / 3 + min(FLASH_S, duration_s / 3)


def _flash(o: Options, rng: np.random.Generator) -> Workload:
    """Zipf, and one adapter of the colder half asked for 50 times as often for five minutes."""
    quiet = _zipf(o, rng)
    cold = o.adapters // 2
    begin, end = flash_window(o.duration_s)
    more = FLASH_FACTOR * zipf_shares(o.adapters, 1)[cold] * o.rate
    times = begin + gamma_arrivals(rng, more, end - begin, o.cv)
    prompt, output = sample_lengths(o.lengths, rng, len(times))
    together = np.concatenate([quiet.time_s, times])
    order = np.argsort(together, kind="stable")
    return Workload(
        "flash",
        quiet.ranks,
        together[order],
        np.concatenate([quiet.adapter, np.full(len(times), cold)])[order],
        np.concatenate([quiet.prompt_tokens, prompt])[order],
        np.concatenate([quiet.output_tokens, output])[order],
        o.duration_s,
        quiet.history,
    )


def _scale(o: Options, rng: np.random.Generator) -> Workload:
    ranks = ranks_by_share(rng, o.adapters)
    return _requests("scale", o, rng, ranks, _popular(rng, zipf_shares(o.adapters, 0.9)))


def _slora(o: Options, rng: np.random.Generator) -> Workload:
    """See power_indices for its trap."""
    ranks = tuple(SLORA_RANKS[i % len(SLORA_RANKS)] for i in range(o.adapters))
    return _requests(
        "slora", o, rng, ranks, lambda times: power_indices(rng, o.adapters, o.alpha, len(times))
    )


def _servegen(o: Options, rng: np.random.Generator) -> Workload:
    return servegen(o.rate, o.duration_s, o.seed, o.adapters)


Maker = Callable[[Options, np.random.Generator], Workload]

WORKLOADS: Mapping[str, Maker] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "long_tail": _long_tail,
    "hot_large": _hot("hot_large", 128),
    "hot_small": _hot("hot_small", 8),
    "drift": _drift("drift", lambda part: part),
    "drift_step": _drift("drift_step", lambda part: (part >= 0.5).astype(float)),
    "servegen": _servegen,
    "flash": _flash,
    "scale": _scale,
    "slora": _slora,
    "one_rank": _one_rank,
}
SUITE = {
    "W1": "uniform",
    "W2": "zipf",
    "W3": "hot_large",
    "W4": "drift",
    "W5": "servegen",
    "W6": "flash",
    "W7": "scale",
}


def make_workload(name: str, options: WorkloadOptions) -> Workload:
    """Raises InvalidArgumentError for an unknown name or options out of range."""
    name = SUITE.get(name.upper(), name)
    if name not in WORKLOADS:
        raise InvalidArgumentError("workload", f"{name!r}: one of {', '.join(WORKLOADS)}, W1 to W7")
    check_positive(adapters=options.adapters, rate=options.rate, duration=options.duration_s)
    check_positive(cv=options.cv)
    return WORKLOADS[name](options, np.random.default_rng(options.seed))


def trace_workload(
    name: str, trace: Trace, adapters: int, seed: int, rate: float | None = None
) -> Workload:
    """A trace with adapters drawn by Zipf 1.0, since it names none; `rate`: sped up or slowed down
    to so many requests/s on average."""
    check_positive(adapters=adapters)
    rng = np.random.default_rng(seed)
    times = trace.time_s
    if rate is not None:
        check_positive(rate=rate)
        times = times * (len(times) / rate / max(float(times[-1]), 1e-9))
    adapter = rng.choice(adapters, len(times), p=zipf_shares(adapters, 1))
    return Workload(
        name,
        ranks_by_share(rng, adapters),
        times,
        adapter,
        trace.prompt_tokens,
        trace.output_tokens,
        float(times[-1]) + 1.0,
    )
