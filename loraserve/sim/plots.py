"""Plots of the claims, as PNG files."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from loraserve.errors import FailedPreconditionError
from loraserve.sim.claims_measures import WITHIN, Row, select, values

_STYLES = ("-o", "-s", "-^", "-v", "-D", "-P", "-X", "-*")


def pyplot_module() -> Any:
    """matplotlib's, without a screen. Raises FailedPreconditionError where it is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise FailedPreconditionError(
            "plots", "they need matplotlib: pip install 'loraserve[sim]'"
        ) from None
    return pyplot


def write_plots(rows: Sequence[Row], output: Path) -> list[Path]:
    """One file for each engine and measure, a panel for each workload. Raises
    FailedPreconditionError where matplotlib is missing."""
    pyplot = pyplot_module()
    paths = []
    loads = select(rows, kind="load", scale=1.0)
    for engine in values(loads, "engine"):
        of_engine = select(loads, engine=engine)
        for key, label, log, line in (
            ("ttft_p95_s", "TTFT p95, s", True, None),
            ("slo_attainment", "requests within SLO", False, WITHIN),
        ):
            path = output / f"{key.removesuffix('_s')}-{engine}.png"
            _curves(pyplot, of_engine, key, label, log, line, f"{engine} engine", path)
            paths.append(path)
    return paths


def _curves(
    pyplot: Any,
    rows: Iterable[Row],
    key: str,
    label: str,
    log: bool,
    line: float | None,
    title: str,
    path: Path,
) -> None:
    rows = list(rows)
    cases, policies = values(rows, "case"), sorted(values(rows, "policy"))
    columns = min(4, len(cases))
    height = -(-len(cases) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(4 * columns, 3 * height), squeeze=False
    )
    panels = [panel for row in axes for panel in row]
    for panel, case in zip(panels, cases, strict=False):
        for policy, style in zip(policies, _STYLES * 4, strict=False):
            curve = select(rows, case=case, policy=policy)
            panel.plot(
                [r["rate_per_s"] for r in curve],
                [r[key] for r in curve],
                style,
                markersize=3,
                linewidth=1,
                label=policy,
            )
        if line is not None:
            panel.axhline(line, color="grey", linewidth=0.5)
        if log:
            panel.set_yscale("log")
        panel.set_title(case, fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in panels[len(cases) :]:
        panel.axis("off")
    for panel in axes[-1]:
        panel.set_xlabel("requests/s", fontsize=8)
    for row in axes:
        row[0].set_ylabel(label, fontsize=8)
    panels[0].legend(fontsize=6)
    figure.suptitle(f"{label}: {title}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
