"""From the objects of `types.py` to columns and back, with the checks of what callers hand in."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from loraserve.errors import InvalidArgumentError
from loraserve.placement.arrays import Floats
from loraserve.placement.columns import Columns, Entries, Plan
from loraserve.placement.types import (
    AdapterId,
    Demand,
    NodeCapacity,
    Placement,
    PlacementProblem,
)


def columns_of(problem: PlacementProblem) -> Columns:
    """Nodes by id; adapters stay in the order of the problem.

    Raises InvalidArgumentError that names the field: demand that is not a finite number of at least
    0, a size, rank, memory, speed or replica count out of range, a name twice."""
    specs, demand = problem.adapters, problem.demand
    nodes = sorted(problem.nodes, key=lambda n: n.node_id)
    row = {s.adapter: i for i, s in enumerate(specs)}
    place = {n.node_id: i for i, n in enumerate(nodes)}
    _refuse_twice("adapters", [s.adapter for s in specs])
    _refuse_twice("nodes", [n.node_id for n in nodes])
    none = Demand()
    rates = [demand.get(s.adapter, none) for s in specs]
    bases = sorted({s.adapter.base for s in specs} | {n.base for n in nodes})
    base_row = {base: i for i, base in enumerate(bases)}
    made = Columns(
        size_bytes=np.array([s.size_bytes for s in specs], np.int64),
        rank=np.array([s.max_rank for s in specs], np.int64),
        prefill=np.array([r.prefill for r in rates], np.float64),
        decode=np.array([r.decode for r in rates], np.float64),
        memory=np.array([n.adapter_memory_bytes for n in nodes], np.int64),
        max_rank=np.array([n.max_rank for n in nodes], np.int64),
        domain=domains_of(nodes),
        speed=np.array([n.speed for n in nodes], np.float64),
        adapter_ids=[s.adapter for s in specs],
        node_ids=[n.node_id for n in nodes],
        adapter_base=np.array([base_row[s.adapter.base] for s in specs], np.int64),
        node_base=np.array([base_row[n.base] for n in nodes], np.int64),
        bases=bases,
        current=_current(problem, row, place),
        forbidden=np.unique(
            np.array(
                [
                    row[a] * len(nodes) + place[n]
                    for a, n in problem.forbidden
                    if a in row and n in place
                ],
                np.int64,
            )
        ),
        replicas=problem.replicas,
        byte_budget=problem.byte_budget,
        load=problem.load,
    )
    check_columns(made)
    return made


def check_columns(p: Columns) -> None:
    """Raises InvalidArgumentError that names the field and the first row that is wrong."""
    _refuse("demand.prefill", p.prefill, ~(np.isfinite(p.prefill) & (p.prefill >= 0)))
    _refuse("demand.decode", p.decode, ~(np.isfinite(p.decode) & (p.decode >= 0)))
    _refuse("adapters.size_bytes", p.size_bytes, p.size_bytes < 0)
    _refuse("adapters.max_rank", p.rank, p.rank < 0)
    _refuse("nodes.adapter_memory_bytes", p.memory, p.memory < 0)
    _refuse("nodes.max_rank", p.max_rank, p.max_rank < 0)
    _refuse("nodes.speed", p.speed, ~(np.isfinite(p.speed) & (p.speed > 0)))
    shares = p.current.share
    _refuse("current_shares", shares, ~(np.isfinite(shares) & (shares >= 0)))
    if p.replicas < 1:
        raise InvalidArgumentError("replicas", f"{p.replicas}: at least 1")
    if p.byte_budget is not None and p.byte_budget < 0:
        raise InvalidArgumentError("byte_budget", f"{p.byte_budget}: at least 0")


def _refuse(field: str, values: Floats | npt.NDArray[Any], wrong: npt.NDArray[Any]) -> None:
    if wrong.any():
        at = int(np.argmax(wrong))
        raise InvalidArgumentError(field, f"{values[at]} in row {at}")


def _refuse_twice(field: str, names: Sequence[object]) -> None:
    if len(set(names)) < len(names):
        seen: set[object] = set()
        twice = next(n for n in names if n in seen or seen.add(n))  # type: ignore[func-returns-value]
        raise InvalidArgumentError(field, f"{twice} is there twice")


def domains_of(nodes: Sequence[NodeCapacity]) -> npt.NDArray[Any]:
    """A node without a domain is one of its own."""
    rows: dict[tuple[bool, str], int] = {}
    keys = [(bool(n.domain), n.domain or n.node_id) for n in nodes]
    return np.array([rows.setdefault(key, len(rows)) for key in keys], np.int64)


def _current(
    problem: PlacementProblem, row: Mapping[AdapterId, int], place: Mapping[str, int]
) -> Entries:
    """What of the current placement is on nodes that are still here; shares as they were."""
    adapters, nodes, shares = [], [], []
    for adapter, held in problem.current.items():
        if adapter not in row:
            continue
        of_each = problem.current_shares.get(adapter)
        if of_each is None or len(of_each) != len(held):
            of_each = (1 / max(1, len(held)),) * len(held)
        for node_id, share in dict(zip(held, of_each, strict=True)).items():
            if node_id in place:
                adapters.append(row[adapter])
                nodes.append(place[node_id])
                shares.append(share)
    return Entries.of(adapters, nodes, shares)


def placement_of(p: Columns, plan: Plan) -> Placement:
    """Back to names; holders by node id."""
    holders: dict[AdapterId, tuple[str, ...]] = {}
    shares: dict[AdapterId, tuple[float, ...]] = {}
    ids, names = cast(Sequence[AdapterId], p.adapter_ids), p.node_ids
    entries = plan.entries
    for a, n, s in zip(
        entries.adapter.tolist(), entries.node.tolist(), entries.share.tolist(), strict=True
    ):
        adapter = ids[a]
        if adapter in holders:
            holders[adapter] += (names[n],)
            shares[adapter] += (s,)
        else:
            holders[adapter], shares[adapter] = (names[n],), (s,)
    return Placement(holders, {ids[a]: why for a, why in plan.reasons.items()}, shares)
