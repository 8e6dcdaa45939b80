"""Every policy over the suite: what is promised, measured. `loraserve simulate claims`.

Loads are parts of what the cluster carries at the operating points of the proportional engine, with
the workload's own ranks. Profiles and grids are fixed here, before any policy runs.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from loraserve.placement.cost_model import Profile, Slo
from loraserve.placement.load import LoadModel
from loraserve.placement.operating_point import LengthMix
from loraserve.placement.policies import DEFAULT_POLICY, POLICIES
from loraserve.sim.capacity import node_rate
from loraserve.sim.claims_report import write_report
from loraserve.sim.metrics import attained
from loraserve.sim.plots import write_plots
from loraserve.sim.profile_files import load_profile
from loraserve.sim.run import SimulationOptions, make_cluster, result_of
from loraserve.sim.sequence import SimSequence
from loraserve.sim.suite import WorkloadOptions, make_workload
from loraserve.sim.workload import Workload

FAMILY = "a100-llama-3-8b"
ENGINES = ("padded", "proportional")
PREFERRED = "rank_aware"
# Hardly any effect of rank: OP[32] is 4 % under OP[8], as constants that were measured on
# Llama-3.1-8B have it (FerranAgulloLopez/DistributedEfficientAdapterLLMServing).
FLAT_RANK_EFFECT = 0.96
# A request's attainment is averaged over so many seconds of arrivals where recovery is looked at.
BIN_S = 10.0
SEED = 1

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One workload of the comparison. `shift`: when demand changes, as a part of the duration."""

    name: str
    workload: str
    adapters: int = 100
    nodes: int = 8
    lengths: str = "azure_conv"
    cv: float = 1.0
    shift: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is run. `node_cases`: those whose number of nodes is searched; `sensitive`: those run
    with the LoRA coefficients times `scales`, and nearly without rank's effect."""

    cases: tuple[Case, ...]
    loads: tuple[float, ...]
    duration_s: float
    node_cases: tuple[str, ...]
    node_counts: tuple[int, ...]
    sensitive: tuple[str, ...]
    scales: tuple[float, ...]
    interval_s: float = 60.0


CASES = (
    Case("uniform", "uniform"),
    Case("zipf-100", "zipf"),
    Case("zipf-400", "zipf", adapters=400),
    Case("zipf-1000", "zipf", adapters=1000),
    Case("zipf-bursty", "zipf", cv=4.0),
    Case("zipf-answers", "zipf", lengths="uniform"),
    Case("zipf-code", "zipf", lengths="azure_code"),
    Case("hot-large", "hot_large"),
    Case("hot-small", "hot_small"),
    Case("drift", "drift"),
    Case("drift-answers", "drift", lengths="uniform"),
    Case("drift-step", "drift_step", shift=0.5),
    Case("servegen", "servegen", adapters=213),
    Case("flash", "flash", shift=1 / 3),
    Case("slora", "slora", lengths="uniform"),
    Case("one-rank", "one_rank"),
    Case("two-nodes", "zipf", nodes=2),
)
FULL = Plan(
    CASES,
    loads=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1),
    duration_s=600.0,
    node_cases=("uniform", "zipf-100", "zipf-answers", "drift", "servegen"),
    node_counts=(4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24),
    sensitive=("uniform", "zipf-answers", "drift"),
    scales=(0.5, 2.0),
)
QUICK = Plan(
    (
        Case("zipf", "zipf", adapters=40, nodes=4),
        Case("answers", "uniform", adapters=40, nodes=4, lengths="uniform"),
        Case("drift-step", "drift_step", adapters=40, nodes=4, shift=0.5),
    ),
    loads=(0.6, 0.9),
    duration_s=90.0,
    node_cases=("zipf",),
    node_counts=(3, 5),
    sensitive=("answers",),
    scales=(2.0,),
    interval_s=20.0,
)


@dataclass(frozen=True)
class Job:
    """One simulation. `scale` multiplies the LoRA coefficients; `nodes` 0 is the case's own number,
    and the load stays that of the case's number."""

    kind: str
    case: Case
    engine: str
    policy: str
    load: float
    duration_s: float
    interval_s: float
    nodes: int = 0
    scale: float = 1.0


def ours() -> str:
    """The policy whose claims these are."""
    return PREFERRED if PREFERRED in POLICIES else DEFAULT_POLICY


def scaled(profile: Profile, scale: float) -> Profile:
    """The same engine with dearer or cheaper LoRA."""
    cost = profile.cost
    return replace(
        profile,
        cost=replace(
            cost,
            token_rank_s=cost.token_rank_s * scale,
            token_max_rank_s=cost.token_max_rank_s * scale,
            adapter_s=cost.adapter_s * scale,
            adapter_byte_s=cost.adapter_byte_s * scale,
        ),
    )


@lru_cache(maxsize=1)
def flat_scale() -> float:
    """The scale at which rank has hardly any effect on the operating point."""
    profile = load_profile(f"{FAMILY}-proportional")
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        points = LoadModel(scaled(profile, middle), Slo(), LengthMix()).points.tokens_per_s
        low, high = (middle, high) if points[32] / points[8] > FLAT_RANK_EFFECT else (low, middle)
    return low


@lru_cache(maxsize=256)
def whole_rate(case: Case, duration_s: float) -> float:
    """Requests/s of load 1: the proportional engine's operating points, weighted by what the
    workload asks for."""
    sample = make_workload(
        case.workload,
        WorkloadOptions(case.adapters, 50.0, duration_s, SEED, 1.0, case.lengths),
    )
    mix = LengthMix(
        float(sample.prompt_tokens.mean()),
        float(sample.output_tokens.mean()),
        max(1, case.adapters // case.nodes),
    )
    ranks = [sample.ranks[adapter] for adapter in sample.adapter.tolist()]
    return case.nodes * node_rate(load_profile(f"{FAMILY}-proportional"), Slo(), mix, ranks)


@lru_cache(maxsize=2)
def _workload(case: Case, load: float, duration_s: float) -> Workload:
    rate = load * whole_rate(case, duration_s)
    return make_workload(
        case.workload,
        WorkloadOptions(case.adapters, rate, duration_s, SEED, case.cv, case.lengths),
    )


def run_job(job: Job) -> Row:
    """The numbers of one simulation, with what it was."""
    workload = _workload(job.case, job.load, job.duration_s)
    profile = scaled(load_profile(f"{FAMILY}-{job.engine}"), job.scale)
    options = SimulationOptions(
        policy=job.policy,
        nodes=job.nodes or job.case.nodes,
        seed=SEED,
        interval_s=job.interval_s,
    )
    cluster = make_cluster(options, profile, workload)
    cluster.run()
    row: Row = {
        **result_of(options, profile, workload, cluster),
        "kind": job.kind,
        "case": job.case.name,
        "engine": job.engine,
        "load": job.load,
        "scale": job.scale,
    }
    if job.case.shift is not None:
        row["attainment_by_bin"] = attainment_by_bin(
            cluster.meter.finished, workload, cluster.meter.slo
        )
    return row


def attainment_by_bin(finished: Sequence[SimSequence], workload: Workload, slo: Slo) -> list[float]:
    """SLO attainment by time of arrival; unfinished requests missed it."""
    bins = int(np.ceil(workload.duration_s / BIN_S))
    asked = np.bincount((workload.time_s / BIN_S).astype(int), minlength=bins)
    kept = np.zeros(bins)
    for sequence in finished:
        kept[int(sequence.arrival_s / BIN_S)] += attained(sequence, slo)
    return [float(k / a) if a else 1.0 for k, a in zip(kept, asked, strict=True)]


def jobs_of(plan: Plan) -> list[Job]:
    """In an order in which runs of the same workload follow each other."""
    jobs = []
    by_name = {case.name: case for case in plan.cases}
    policies = sorted(POLICIES)
    for case in plan.cases:
        for load in plan.loads:
            for engine in ENGINES:
                for policy in policies:
                    jobs.append(
                        Job("load", case, engine, policy, load, plan.duration_s, plan.interval_s)
                    )
    for name in plan.node_cases:
        case = by_name[name]
        for nodes in plan.node_counts:
            for engine in ENGINES:
                for policy in policies:
                    jobs.append(
                        Job(
                            "nodes",
                            case,
                            engine,
                            policy,
                            0.6,
                            plan.duration_s,
                            plan.interval_s,
                            nodes=nodes,
                        )
                    )
    for name in plan.sensitive:
        case = by_name[name]
        for scale in (flat_scale(), *plan.scales):
            for load in plan.loads:
                for policy in policies:
                    jobs.append(
                        Job(
                            "scale",
                            case,
                            "padded",
                            policy,
                            load,
                            plan.duration_s,
                            plan.interval_s,
                            scale=scale,
                        )
                    )
    return jobs


def _run_all(jobs: Sequence[Job], workers: int, say: Callable[[str], None]) -> list[Row]:
    if workers == 1:
        return list(_told(map(run_job, jobs), len(jobs), say))
    # Spawned: threads of libraries that are loaded do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(_told(pool.map(run_job, jobs, chunksize=4), len(jobs), say))


def _told(rows: Iterable[Row], count: int, say: Callable[[str], None]) -> Iterable[Row]:
    for number, row in enumerate(rows, 1):
        if number % 50 == 0 or number == count:
            say(f"{number} of {count} simulations")
        yield row


def run_claims(
    quick: bool, workers: int, output: Path, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Runs the plan and writes placement.json, plots and placement.md into `output`; the report's
    path."""
    plan = QUICK if quick else FULL
    output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    rows = _run_all(jobs_of(plan), workers, say)
    seconds = time.monotonic() - begun
    facts = {
        "plan": asdict(plan),
        "quick": quick,
        "seconds": round(seconds, 1),
        "workers": workers,
        "cores": os.cpu_count(),
        "ours": ours(),
        "family": FAMILY,
        "flat_scale": flat_scale(),
        "bin_s": BIN_S,
    }
    (output / "placement.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    plots = write_plots(rows, output)
    return write_report(rows, facts, plots, output)
