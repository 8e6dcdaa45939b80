"""The simulations behind the claims: one sweep is one policy on one workload and engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from loraserve.placement.cost_model import Profile, Slo
from loraserve.placement.load import LoadModel
from loraserve.placement.operating_point import LengthMix
from loraserve.profiles.files import load_profile
from loraserve.sim.capacity import node_rate
from loraserve.sim.claims_cases import FAMILY, MIDDLE_LOAD, Case
from loraserve.sim.claims_measures import WITHIN
from loraserve.sim.metrics import attained
from loraserve.sim.run import SimulationOptions, make_cluster, result_of
from loraserve.sim.sequence import SimSequence
from loraserve.sim.suite import WorkloadOptions, make_workload
from loraserve.sim.workload import Workload

# The paper's fear, that rank hardly matters: OP[32] 4 % under OP[8], as it was measured for
# Llama-3.1-8B with 1280 adapters on 4 servers and requests of these lengths
# (FerranAgulloLopez/DistributedEfficientAdapterLLMServing).
FLAT_RANK_EFFECT = 0.96
FLAT_MIX = LengthMix(prompt=221.7, output=196.5, adapters=320)
# A request's attainment is averaged over so many seconds of arrivals where recovery is looked at.
BIN_S = 10.0
SEED = 1
# A sweep of loads ends after two points with less than this within the SLO.
_HOPELESS = 0.5

Row = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """`kind` load: rising loads on the case's nodes. `nodes`: rising numbers of nodes under the
    middle load of the case's own number. `scale` multiplies the LoRA coefficients."""

    kind: str
    case: Case
    engine: str
    policy: str
    points: tuple[float, ...]
    duration_s: float
    interval_s: float
    scale: float = 1.0


def run_sweep(sweep: Sweep) -> list[Row]:
    """A row for each point, until more would tell nothing."""
    rows: list[Row] = []
    for point in sweep.points:
        rows.append(_run(sweep, point))
        last = [row["slo_attainment"] for row in rows[-2:]]
        if sweep.kind == "load" and len(last) == 2 and max(last) < _HOPELESS:
            break
        if sweep.kind == "nodes" and len(last) == 2 and min(last) >= WITHIN:
            break
    return rows


def _run(sweep: Sweep, point: float) -> Row:
    case = sweep.case
    by_nodes = sweep.kind == "nodes"
    load = MIDDLE_LOAD if by_nodes else point
    workload = _workload(case, load, sweep.duration_s)
    profile = scaled(load_profile(f"{FAMILY}-{sweep.engine}"), sweep.scale)
    options = SimulationOptions(
        policy=sweep.policy,
        nodes=int(point) if by_nodes else case.nodes,
        seed=SEED,
        interval_s=sweep.interval_s,
    )
    cluster = make_cluster(options, profile, workload)
    cluster.run()
    row: Row = {
        **result_of(options, profile, workload, cluster),
        "kind": sweep.kind,
        "case": case.name,
        "engine": sweep.engine,
        "load": load,
        "scale": sweep.scale,
    }
    if case.shift is not None:
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
        points = LoadModel(scaled(profile, middle), Slo(), FLAT_MIX).points.tokens_per_s
        effect = points[32] / points[8]
        low, high = (middle, high) if effect > FLAT_RANK_EFFECT else (low, middle)
    return low


@lru_cache(maxsize=64)
def whole_rate(case: Case, duration_s: float) -> float:
    """Requests/s of load 1: the proportional engine's operating points, weighted by what the
    workload asks for."""
    sample = make_workload(
        case.workload, WorkloadOptions(case.adapters, 50.0, duration_s, SEED, 1.0, case.lengths)
    )
    mix = LengthMix(
        float(sample.prompt_tokens.mean()),
        float(sample.output_tokens.mean()),
        max(1, case.adapters // case.nodes),
    )
    ranks = [sample.ranks[adapter] for adapter in sample.adapter.tolist()]
    return case.nodes * node_rate(load_profile(f"{FAMILY}-proportional"), Slo(), mix, ranks)


@lru_cache(maxsize=24)
def _workload(case: Case, load: float, duration_s: float) -> Workload:
    rate = load * whole_rate(case, duration_s)
    return make_workload(
        case.workload,
        WorkloadOptions(case.adapters, rate, duration_s, SEED, case.cv, case.lengths),
    )
