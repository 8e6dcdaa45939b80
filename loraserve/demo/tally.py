"""The demo's result: outcomes counted by rank. Pure."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraserve.demo.replay import Outcome

MIN_CORRECT = 0.95


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True)
class Row:
    """Requests of one rank, or of all. Times in seconds, None where there is nothing to time."""

    requests: int
    correct: int
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    tbt_p50_s: float | None
    tbt_p95_s: float | None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Row":
        ttft = [o.ttft_s for o in outcomes if o.ttft_s is not None]
        tbt = [gap for o in outcomes for gap in o.gaps_s]
        return cls(
            len(outcomes),
            sum(o.correct for o in outcomes),
            percentile(ttft, 0.50),
            percentile(ttft, 0.95),
            percentile(tbt, 0.50),
            percentile(tbt, 0.95),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in vars(self).items()
        }


@dataclass(frozen=True)
class Tally:
    """`lost`: requests that got no whole answer. `holders`: node id to its adapters."""

    rows: Mapping[int, Row]
    """By rank, ascending."""
    whole: Row
    lost: int
    errors: tuple[str, ...]
    tokens: int
    seconds: float
    resent: int
    """Requests that needed more than one attempt."""
    most_in_flight: int
    most_adapters: int
    holders: Mapping[str, Sequence[str]]
    peer_reads: Mapping[str, int]
    """Adapters that nodes read from each other, by transport."""

    @property
    def passed(self) -> bool:
        enough = self.whole.correct >= MIN_CORRECT * self.whole.requests
        return self.whole.requests > 0 and self.lost == 0 and enough

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "requests": self.whole.requests,
            "correct": self.whole.correct,
            "lost": self.lost,
            "errors": list(self.errors),
            "resent": self.resent,
            "seconds": round(self.seconds, 3),
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "most_in_flight": self.most_in_flight,
            "most_adapters_in_flight": self.most_adapters,
            "by_rank": {str(rank): row.to_json() for rank, row in self.rows.items()},
            "all": self.whole.to_json(),
            "peer_reads": dict(self.peer_reads),
            "nodes": {node: list(names) for node, names in self.holders.items()},
        }


def tally(
    outcomes: Sequence[Outcome],
    expected: int,
    seconds: float,
    most_in_flight: int,
    most_adapters: int,
    holders: Mapping[str, Iterable[str]],
    peer_reads: Mapping[str, int],
) -> Tally:
    """`expected`: requests that were to be made; those without an outcome are lost."""
    ranks = sorted({o.arrival.skill.rank for o in outcomes})
    errors = [o.error for o in outcomes if o.error is not None]
    return Tally(
        rows={r: Row.of([o for o in outcomes if o.arrival.skill.rank == r]) for r in ranks},
        whole=Row.of(outcomes),
        lost=expected - len(outcomes) + len(errors),
        errors=tuple(dict.fromkeys(errors))[:10],
        tokens=sum(o.tokens for o in outcomes),
        seconds=seconds,
        resent=sum(o.attempts > 1 for o in outcomes),
        most_in_flight=most_in_flight,
        most_adapters=most_adapters,
        holders={node: tuple(sorted(names)) for node, names in sorted(holders.items())},
        peer_reads=dict(sorted(peer_reads.items())),
    )
