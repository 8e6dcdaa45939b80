"""A whole placement in three steps: what is asked, the answer, and what of it is adopted.

A question is a snapshot that nobody changes, and `solve` is a function of it alone, so that the
daemon may run it in another thread while heartbeats go on. `planner.py` asks and adopts.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

import numpy as np

from loraserve.controller.catalog import Rows
from loraserve.controller.problem import ProblemLimits, changed_targets, columns_of_cluster
from loraserve.controller.targets import NOWHERE, Target, target
from loraserve.errors import LoraServeError
from loraserve.placement.autoscale import WantedNodes, wanted_nodes
from loraserve.placement.bases import part_of
from loraserve.placement.columns import Columns, Entries, Plan, node_ranks, utilisation
from loraserve.placement.policies import ObjectPolicy
from loraserve.placement.types import (
    AdapterId,
    AdapterSpec,
    Demand,
    NodeCapacity,
    PlacementPolicy,
    PlacementProblem,
)


@dataclass(frozen=True, eq=False)
class PlacementQuestion:
    """`nodes`: those that may get adapters, by id. `strain`: the part of some nodes that is taken
    already. `idle`: by rank, the demand of each adapter that `demand` does not name. `current`: the
    targets as they are, and where adapters that have none are found all the same. `displaced`:
    those, and adapters with a target on a node that has gone: what `current` says of them is not
    what is wanted."""

    policy: PlacementPolicy
    rows: Rows
    nodes: tuple[NodeCapacity, ...]
    strain: Mapping[str, float]
    demand: Mapping[AdapterId, Demand]
    idle: Mapping[int, Demand]
    current: Mapping[AdapterId, Target]
    displaced: Set[AdapterId]
    limits: ProblemLimits


@dataclass(frozen=True, eq=False)
class PlacementAnswer:
    """`changes`: adapters that the plan wants elsewhere than they were, or with other shares.
    `ranks`: of each node, the largest with demand or, where none has, of all. Where there is
    `trouble`, nothing else is."""

    question: PlacementQuestion
    trouble: str = ""
    columns: Columns | None = None
    plan: Plan = field(default_factory=lambda: Plan(Entries.none()))
    changes: tuple[tuple[AdapterSpec, Target], ...] = ()
    utilisation: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    wanted: Mapping[str, WantedNodes] = field(default_factory=dict)


def solve(question: PlacementQuestion) -> PlacementAnswer:
    """Pure. A policy that fails is an answer too."""
    try:
        p = columns_of_cluster(
            question.rows,
            question.nodes,
            question.demand,
            question.current,
            question.limits,
            question.idle,
        )
        whole = p
        if question.strain:
            left = [1 - question.strain.get(n, 0.0) for n in p.node_ids]
            p = replace(p, speed=p.speed * np.array(left))
        plan = _plan(p, question)
    except LoraServeError as error:
        return PlacementAnswer(question, f"placement failed, all stays where it is: {error}")
    changes = tuple(changed_targets(p, plan, question.rows, question.displaced))
    busy = utilisation(p, plan.entries).tolist() if p.nodes else []
    everything = replace(p, prefill=np.ones(p.adapters)) if p.nodes else p
    ranks = node_ranks(everything, plan.entries).tolist() if p.nodes else []
    active = node_ranks(p, plan.entries).tolist() if p.nodes else []
    wanted = {}
    for row, base in enumerate(p.bases):
        adapters = np.flatnonzero(p.adapter_base == row)
        nodes = np.flatnonzero(p.node_base == row)
        # What waits will be gone: it is not what nodes are bought for.
        wanted[base] = wanted_nodes(part_of(whole, adapters, nodes))
    return PlacementAnswer(
        question,
        "",
        p,
        plan,
        changes,
        dict(zip(p.node_ids, busy, strict=True)),
        {n: a or r for n, a, r in zip(p.node_ids, active, ranks, strict=True)},
        wanted,
    )


def _plan(p: Columns, question: PlacementQuestion) -> Plan:
    if isinstance(question.policy, ObjectPolicy):
        return question.policy.on_columns(p)
    rows, current = question.rows, question.current
    by_id = {n: i for i, n in enumerate(p.node_ids)}
    placement = question.policy(
        PlacementProblem(
            tuple(rows.specs),
            question.nodes,
            question.demand,
            {a: t.nodes for a, t in current.items()},
            question.limits.forbidden,
            p.replicas,
            {a: t.shares for a, t in current.items()},
            p.byte_budget,
            p.load,
        )
    )
    entries = [
        (rows.row[a], by_id[n], s)
        for a, held in placement.holders.items()
        for n, s in target(held, placement.shares.get(a, ())).parts
    ]
    reasons = {rows.row[a]: why for a, why in placement.unplaced.items()}
    return Plan(Entries.of(*(zip(*entries, strict=True) if entries else ([], [], []))), reasons)


class Since:
    """What of an answer still holds, with the nodes and the failed pairs of now."""

    def __init__(
        self,
        question: PlacementQuestion,
        nodes: tuple[NodeCapacity, ...],
        forbidden: frozenset[tuple[AdapterId, str]],
    ) -> None:
        self._forbidden = forbidden - question.limits.forbidden
        now = {n.node_id: _means(n) for n in nodes}
        self.nodes = {n.node_id for n in question.nodes if now.get(n.node_id) == _means(n)}
        self._same = not self._forbidden and len(self.nodes) == len(question.nodes)

    def possible(self, adapter: AdapterId, wanted: Target) -> Target:
        """The part of the target on nodes that are as they were and may hold the adapter; NOWHERE
        where nothing is left."""
        if self._same:
            return wanted
        left = [
            (n, s)
            for n, s in wanted.parts
            if n in self.nodes and (adapter, n) not in self._forbidden
        ]
        if len(left) == len(wanted.nodes):
            return wanted
        whole = sum(s for _, s in left)
        if not whole:
            return target(tuple(n for n, _ in left)) if left else NOWHERE
        return target(tuple(n for n, _ in left), tuple(s / whole for _, s in left))


def _means(node: NodeCapacity) -> tuple[object, ...]:
    """What a plan counts on; that a domain counts or not depends on the other nodes."""
    return (node.base, node.adapter_memory_bytes, node.max_rank)
