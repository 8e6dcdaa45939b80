"""The report of the claims, as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraserve.sim.claims_cases import MIDDLE_LOAD
from loraserve.sim.claims_measures import (
    WITHIN,
    Row,
    at_load,
    knee,
    nodes_needed,
    rank_blind,
    recovery_s,
    select,
    sustained_rate,
    values,
)

_GIB = 1 << 30


def write_report(
    rows: Sequence[Row], facts: Mapping[str, Any], plots: Iterable[Path], output: Path
) -> Path:
    report = _Report(rows, facts)
    path = output / "placement.md"
    path.write_text("\n".join([*report.lines(), *_pictures(plots)]) + "\n")
    return path


def _pictures(plots: Iterable[Path]) -> list[str]:
    lines = ["## Curves", ""]
    for path in plots:
        lines += [f"![{path.stem}]({path.name})", ""]
    return lines


def _table(head: Sequence[str], body: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in body), ""]


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}x" if b > 0 else "-"


class _Report:
    def __init__(self, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
        self._rows = rows
        self._facts = facts
        self._ours = facts["ours"]
        self._loads = select(rows, kind="load", scale=1.0)
        self._cases = values(self._loads, "case")
        self._engines = values(self._loads, "engine")
        self._policies = sorted(values(self._loads, "policy"))
        self._blind = rank_blind(self._policies, self._ours)

    def lines(self) -> list[str]:
        lines = self._opening()
        for engine in self._engines:
            lines += self._throughput(engine)
        lines += self._whole()
        for engine in self._engines:
            lines += self._ttft(engine)
        lines += self._nodes() + self._memory() + self._recovery()
        return lines + self._sensitivity() + self._losses()

    def _curve(self, case: str, engine: str, policy: str) -> list[Row]:
        return select(self._loads, case=case, engine=engine, policy=policy)

    def _rate(self, case: str, engine: str, policy: str) -> float:
        return sustained_rate(self._curve(case, engine, policy))[0]

    def _best_blind(self, case: str, engine: str) -> tuple[str, float]:
        rates = {p: self._rate(case, engine, p) for p in self._blind}
        best = max(rates, key=lambda p: rates[p])
        return best, rates[best]

    def _opening(self) -> list[str]:
        f = self._facts
        kind = " (quick: too short and small to conclude from)" if f["quick"] else ""
        return [
            f"# Placement policies compared{kind}",
            "",
            f"Written by `loraserve simulate claims{' --quick' if f['quick'] else ''}`: "
            f"{len(self._rows)} simulations in {f['seconds']} s with {f['workers']} processes on "
            f"{f['cores']} cores. All rows are in `placement.json`.",
            "",
            f"Engines: `{f['family']}-padded` pads every batch to its largest rank, as the paper's "
            f"baselines do; `{f['family']}-proportional` is ours. Their coefficients come from "
            "published tables (`tools/make_profiles.py`) and were fixed before any policy ran. "
            "SLO: TTFT within 5 s and 95 % of a request's times between tokens within 150 ms; a "
            "rate is sustained while 90 % of the requests attain both. Ours is "
            f"`{self._ours}`; rank-blind baselines are {', '.join(f'`{p}`' for p in self._blind)}.",
            "",
        ]

    def _throughput(self, engine: str) -> list[str]:
        body = []
        for case in self._cases:
            cells = []
            for policy in self._policies:
                curve = self._curve(case, engine, policy)
                rate, open_end = sustained_rate(curve)
                first = curve[0]
                if first["slo_attainment"] < WITHIN:
                    cells.append(f"< {first['rate_per_s']:.1f}")
                else:
                    cells.append(f"{'≥ ' if open_end else ''}{rate:.1f}")
            best, rate = self._best_blind(case, engine)
            gain = _ratio(self._rate(case, engine, self._ours), rate)
            body.append([case, *cells, f"{gain} ({best})"])
        return [
            f"## Sustained requests/s within SLO: {engine} engine",
            "",
            "≥: within SLO up to the highest load tried; <: not even at the lowest. Ratios take "
            "the highest load, or a straight line from no load at all, in their place.",
            "",
            *_table(["workload", *self._policies, "ours to best rank-blind"], body),
        ]

    def _whole(self) -> list[str]:
        """The product against what is run today: both the engine and the policy differ."""
        if set(self._engines) != {"padded", "proportional"}:
            return []
        body = []
        for case in self._cases:
            best, rate = self._best_blind(case, "padded")
            mine = self._rate(case, "proportional", self._ours)
            body.append([case, f"{rate:.1f} ({best})", f"{mine:.1f}", _ratio(mine, rate)])
        return [
            "## Our engine and policy against the padded engine and the best rank-blind policy",
            "",
            *_table(["workload", "padded, rank-blind", "ours", "ratio"], body),
        ]

    def _ttft(self, engine: str) -> list[str]:
        body = []
        for case in self._cases:
            for policy in self._blind:
                point = knee(self._curve(case, engine, policy))
                if point is None:
                    continue
                mine = at_load(self._curve(case, engine, self._ours), point["load"])
                if mine is None:
                    continue
                body.append(
                    [
                        case,
                        policy,
                        f"{point['rate_per_s']:.1f}",
                        f"{point['ttft_p95_s']:.2f}",
                        f"{mine['ttft_p95_s']:.2f}",
                        _ratio(point["ttft_p95_s"], mine["ttft_p95_s"]),
                    ]
                )
        head = ["workload", "baseline", "requests/s", "its TTFT p95, s", "ours, s", "ratio"]
        return [
            f"## TTFT p95 at the baseline's knee: {engine} engine",
            "",
            "The knee is the lowest rate of the grid at which less than 90 % attain the SLO. Next "
            "to a knee a ratio can be as large as one likes: the curves below are what counts.",
            "",
            *_table(head, body),
        ]

    def _nodes(self) -> list[str]:
        rows = select(self._rows, kind="nodes")
        body = []
        for case in values(rows, "case"):
            for engine in values(rows, "engine"):
                needed = [
                    nodes_needed(select(rows, case=case, engine=engine, policy=p))
                    for p in self._policies
                ]
                largest = max(values(rows, "nodes"))
                body.append([case, engine, *(n or f"> {largest}" for n in needed)])
        head = ["workload", "engine", *self._policies]
        tried = ", ".join(str(n) for n in sorted(values(rows, "nodes")))
        return [
            f"## Nodes needed for the same requests (load {MIDDLE_LOAD} of the case's nodes)",
            "",
            f"Tried: {tried}.",
            "",
            *_table(head, body),
        ]

    def _memory(self) -> list[str]:
        body = []
        for case in self._cases:
            for policy in self._policies:
                row = self._middle(case, self._engines[-1], policy)
                if row is not None:
                    share = row["adapter_bytes_held"] / row["full_replication_bytes"]
                    body.append(
                        [
                            case,
                            policy,
                            f"{row['adapter_bytes_held'] / _GIB:.1f}",
                            f"{share:.0%}",
                            f"{row['bytes_moved'] / _GIB:.1f}",
                            f"{row['max_over_mean_load']:.2f}",
                        ]
                    )
        head = ["workload", "policy", "held, GiB", "of full replication", "moved, GiB", "max/mean"]
        return [
            f"## Adapter memory, bytes moved and balance at a middle load, {self._engines[-1]}",
            "",
            "max/mean: work of the busiest node over the mean, by placement interval.",
            "",
            *_table(head, body),
        ]

    def _middle(self, case: str, engine: str, policy: str) -> Row | None:
        curve = self._curve(case, engine, policy)
        return min(curve, key=lambda r: abs(r["load"] - MIDDLE_LOAD)) if curve else None

    def _recovery(self) -> list[str]:
        shifts = {c["name"]: c["shift"] for c in self._facts["plan"]["cases"]}
        body = []
        for case in (c for c in self._cases if shifts[c] is not None):
            for engine in self._engines:
                cells = []
                for policy in self._policies:
                    row = self._middle(case, engine, policy)
                    if row is None:
                        cells.append("-")
                        continue
                    bins, shift_s = row["attainment_by_bin"], shifts[case] * row["duration_s"]
                    seconds = recovery_s(bins, self._facts["bin_s"], shift_s)
                    cells.append("not" if seconds is None else f"{seconds:.0f}")
                body.append([case, engine, *cells])
        return [
            "## Recovery after a shift, seconds",
            "",
            "Until 90 % attain the SLO again for three bins of 10 s in a row; 0: it never fell. At "
            "the middle load.",
            "",
            *_table(["workload", "engine", *self._policies], body),
        ]

    def _sensitivity(self) -> list[str]:
        rows = select(self._rows, kind="load", engine="padded")
        body = []
        for case in values((r for r in rows if r["scale"] != 1.0), "case"):
            for scale in sorted(values(rows, "scale")):
                rates = {
                    p: sustained_rate(select(rows, case=case, policy=p, scale=scale))[0]
                    for p in self._policies
                }
                best = max(self._blind, key=lambda p: rates[p])
                flat = " (flat)" if scale == self._facts["flat_scale"] else ""
                body.append(
                    [
                        case,
                        f"{scale:.2f}x{flat}",
                        f"{rates[self._ours]:.1f}",
                        f"{rates[best]:.1f} ({best})",
                        _ratio(rates[self._ours], rates[best]),
                    ]
                )
        head = ["workload", "LoRA coefficients", "ours", "best rank-blind", "ratio"]
        return [
            "## Sensitivity: padded engine with other LoRA coefficients",
            "",
            "Flat: so small that rank 32 costs 4 % of throughput against rank 8 with 320 adapters "
            "a node, as one published measurement has it.",
            "",
            *_table(head, body),
        ]

    def _losses(self) -> list[str]:
        lines = ["## Where ours is not the best", ""]
        for engine in self._engines:
            for case in self._cases:
                mine = self._rate(case, engine, self._ours)
                for policy in self._policies:
                    other = self._rate(case, engine, policy)
                    if policy != self._ours and other > mine * 1.005:
                        lines.append(
                            f"- {case}, {engine}: `{policy}` sustains {other:.1f} requests/s, "
                            f"{_ratio(other, mine)} of ours."
                        )
        return [*lines, *(["Nowhere on this grid."] if len(lines) == 2 else []), ""]
