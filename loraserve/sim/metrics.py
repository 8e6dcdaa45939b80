"""What came out of a run, as numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from loraserve.placement.cost_model import Profile, Slo
from loraserve.sim.gaps import GapHistogram
from loraserve.sim.sequence import BASE_ONLY, AdapterTable, SimSequence

# Of a request's times between tokens, so many may be over the SLO's.
_LATE_GAPS = 0.05


@dataclass
class Meter:
    """Collects while the simulation runs."""

    slo: Slo
    gaps: GapHistogram = field(default_factory=GapHistogram)
    finished: list[SimSequence] = field(default_factory=list)
    lost: int = 0
    retries: int = 0
    held_bytes: list[int] = field(default_factory=list)
    """At every tick, of all nodes."""
    work_s: list[list[float]] = field(default_factory=list)
    """By window and node: seconds of engine work that its requests are worth."""


def request_work_s(profile: Profile, adapters: AdapterTable, sequence: SimSequence) -> float:
    """What the request is worth on any node: its tokens at the profile's prices, the adapter at its
    own rank. The same for every policy, so that balance can be compared."""
    cost = profile.cost.loaded()
    rank = 0 if sequence.adapter == BASE_ONLY else adapters.ranks[sequence.adapter]
    per_rank = cost.token_rank_s + cost.token_max_rank_s
    prompt, output = sequence.prompt_tokens, sequence.output_tokens
    context = prompt + output / 2
    return prompt * (
        cost.prefill_token_s + per_rank * rank + cost.chunk_context_s * prompt / 2
    ) + output * (cost.decode_token_s + per_rank * rank + cost.context_token_s * context)


def attained(sequence: SimSequence, slo: Slo) -> bool:
    """Its first token in time, and 95 % of its later ones within the SLO of each other."""
    if sequence.finish_s < 0:
        return False
    in_time = sequence.first_token_s - sequence.arrival_s <= slo.ttft_p95_s
    return in_time and sequence.late_gaps <= _LATE_GAPS * sequence.gaps


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(np.array(values), percent)) if values else 0.0


def max_over_mean(work_s: Sequence[Sequence[float]]) -> float:
    """Of the nodes' work in a window, averaged over the windows by their work; 1 is balance."""
    table = np.array([row for row in work_s if sum(row) > 0])
    if not len(table):
        return 1.0
    total = table.sum(axis=1)
    return float((table.max(axis=1) * table.shape[1] / total * total).sum() / total.sum())


def summary(meter: Meter, requests: int, duration_s: float, end_s: float) -> dict[str, float | int]:
    """Times in seconds. Throughput counts prompt and output tokens of finished requests over the
    time from the first request's to the last token, and at least the workload's duration."""
    done = meter.finished
    ttft = [s.first_token_s - s.arrival_s for s in done]
    tokens = sum(s.prompt_tokens + s.output_tokens for s in done)
    output = sum(s.output_tokens for s in done)
    span = max(duration_s, end_s)
    held = meter.held_bytes or [0]
    return {
        "requests": requests,
        "finished": len(done),
        "unfinished": requests - len(done),
        "lost": meter.lost,
        "retries": meter.retries,
        "ttft_mean_s": float(np.mean(ttft)) if ttft else 0.0,
        "ttft_p50_s": percentile(ttft, 50),
        "ttft_p95_s": percentile(ttft, 95),
        "ttft_p99_s": percentile(ttft, 99),
        "tbt_mean_s": meter.gaps.mean,
        "tbt_p50_s": meter.gaps.percentile(50),
        "tbt_p95_s": meter.gaps.percentile(95),
        "throughput_tokens_per_s": tokens / span if span else 0.0,
        "output_tokens_per_s": output / span if span else 0.0,
        "slo_attainment": (
            sum(attained(s, meter.slo) for s in done) / requests if requests else 1.0
        ),
        "adapter_bytes_held": int(np.mean(held)),
        "adapter_bytes_peak": max(held),
        "max_over_mean_load": max_over_mean(meter.work_s),
    }
