"""Every policy over the suite: what is promised, measured. `loraserve simulate claims`."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from loraserve.placement.policies import DEFAULT_POLICY, POLICIES
from loraserve.sim.claims_cases import ENGINES, FAMILY, FULL, QUICK, Case, Plan
from loraserve.sim.claims_report import write_report
from loraserve.sim.claims_runs import BIN_S, Row, Sweep, flat_scale, run_sweep
from loraserve.sim.plots import pyplot_module, write_plots


def sweeps_of(plan: Plan) -> list[Sweep]:
    """In an order in which sweeps over the same workload follow each other."""

    def sweep(kind: str, case: Case, engine: str, policy: str, scale: float = 1.0) -> Sweep:
        loads = case.loads or plan.loads
        points = tuple(plan.node_counts) if kind == "nodes" else loads
        duration_s = case.duration_s or plan.duration_s
        return Sweep(kind, case, engine, policy, points, duration_s, plan.interval_s, scale)

    sweeps = []
    by_name = {case.name: case for case in plan.cases}
    policies = sorted(POLICIES)
    for case in plan.cases:
        for engine in ENGINES:
            for policy in policies:
                sweeps.append(sweep("load", case, engine, policy))
    for name in plan.node_cases:
        for engine in ENGINES:
            for policy in policies:
                sweeps.append(sweep("nodes", by_name[name], engine, policy))
    for name in plan.sensitive:
        for scale in (flat_scale(), *plan.scales):
            for policy in policies:
                sweeps.append(sweep("load", by_name[name], "padded", policy, scale))
    return sweeps


def _run_all(sweeps: Sequence[Sweep], workers: int, say: Callable[[str], None]) -> list[Row]:
    if workers == 1:
        return _collected(map(run_sweep, sweeps), len(sweeps), say)
    # Spawned: threads of libraries that are loaded do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return _collected(pool.map(run_sweep, sweeps), len(sweeps), say)


def _collected(results: Iterable[list[Row]], count: int, say: Callable[[str], None]) -> list[Row]:
    rows = []
    for number, found in enumerate(results, 1):
        rows += found
        if number % 20 == 0 or number == count:
            say(f"{number} of {count} sweeps, {len(rows)} simulations")
    return rows


def run_claims(
    quick: bool, workers: int, output: Path, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Runs the plan and writes placement.json, plots and placement.md into `output`; the report's
    path. Raises FailedPreconditionError, before it runs anything, where matplotlib is missing."""
    pyplot_module()
    plan = QUICK if quick else FULL
    output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    rows = _run_all(sweeps_of(plan), workers, say)
    facts = {
        "plan": asdict(plan),
        "quick": quick,
        "seconds": round(time.monotonic() - begun, 1),
        "workers": workers,
        "cores": os.cpu_count(),
        "ours": DEFAULT_POLICY,
        "family": FAMILY,
        "flat_scale": flat_scale(),
        "bin_s": BIN_S,
    }
    # One row a line.
    body = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps(facts, indent=1)
    (output / "placement.json").write_text(f'{head[:-2]},\n "rows": [\n{body}\n]}}\n')
    plots = write_plots(rows, output)
    return write_report(rows, facts, plots, output)
