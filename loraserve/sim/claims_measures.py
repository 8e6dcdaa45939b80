"""From rows of simulations to the numbers that claims are about. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# "Within SLO": so many of the requests attain it.
WITHIN = 0.9
# Policies that look at load or names only; the others know ranks.
RANK_BLIND = ("random", "contiguous", "hash", "load_only")
_RECOVERED_BINS = 3


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Rows with these values, by load and nodes."""
    found = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return sorted(found, key=lambda r: (r["load"], r["nodes"]))


def values(rows: Iterable[Row], key: str) -> list[Any]:
    """The different ones, in the order of their first row."""
    return list(dict.fromkeys(r[key] for r in rows))


def rank_blind(policies: Iterable[str], ours: str) -> list[str]:
    """The baselines; where none of them is there yet, whatever is not ours."""
    known = [p for p in policies if p != ours]
    return [p for p in known if p in RANK_BLIND] or known or [ours]


def sustained_rate(curve: Sequence[Row]) -> tuple[float, bool]:
    """The rate up to which 90 % of the requests attain the SLO, between two points of the curve by
    a straight line; and whether the curve ended before it fell."""
    last_rate, last = 0.0, 1.0
    for row in curve:
        rate, attainment = row["rate_per_s"], row["slo_attainment"]
        if attainment < WITHIN:
            return last_rate + (rate - last_rate) * (last - WITHIN) / (last - attainment), False
        last_rate, last = rate, attainment
    return last_rate, True


def knee(curve: Sequence[Row]) -> Row | None:
    """The point of the lowest rate at which less than 90 % attain the SLO."""
    return next((row for row in curve if row["slo_attainment"] < WITHIN), None)


def at_load(curve: Sequence[Row], load: float) -> Row | None:
    return next((row for row in curve if abs(row["load"] - load) < 1e-9), None)


def nodes_needed(curve: Sequence[Row]) -> int | None:
    """The fewest nodes with 90 % within the SLO, none of the larger clusters under it; None where
    even the largest is."""
    needed = None
    for row in sorted(curve, key=lambda r: -r["nodes"]):
        if row["slo_attainment"] < WITHIN:
            break
        needed = row["nodes"]
    return needed


def recovery_s(bins: Sequence[float], bin_s: float, shift_s: float) -> float | None:
    """From the shift until attainment is back over 90 % for three bins in a row; 0 where it never
    fell, None where it does not come back."""
    start = int(shift_s // bin_s)
    after = bins[start:]
    if all(a >= WITHIN for a in after[:-1]):
        return 0.0
    fell = next(i for i, a in enumerate(after) if a < WITHIN)
    for i in range(fell, len(after) - _RECOVERED_BINS + 1):
        if all(a >= WITHIN for a in after[i : i + _RECOVERED_BINS]):
            return (start + i) * bin_s - shift_s
    return None
