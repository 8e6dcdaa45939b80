"""What should be where: demand, the placement policy, and how many nodes would be right.

A whole placement costs O(adapters) and happens once an interval, when nodes come or go, and on a
burst; at most once a tick. One new adapter is given a home beside what stands. Hysteresis, beside
that of the policy: a plan that lowers the predicted peak by too little moves nothing that may stay,
and an adapter that was moved stays where it is for an interval, though it may get more copies.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import numpy as np

from loraserve.controller.catalog import Catalog, Rows
from loraserve.controller.home import Site, first_home, stays
from loraserve.controller.problem import ProblemLimits, changed_targets, columns_of_cluster
from loraserve.controller.settings import Settings
from loraserve.controller.targets import NOWHERE, Target, Targets, target
from loraserve.errors import LoraServeError
from loraserve.placement.autoscale import WantedNodes, wanted_nodes
from loraserve.placement.bases import part_of
from loraserve.placement.columns import Columns, Entries, Plan, node_ranks, peak, utilisation
from loraserve.placement.demand import DemandTracker, bursts
from loraserve.placement.load import LoadModel
from loraserve.placement.policies import ObjectPolicy
from loraserve.placement.types import (
    AdapterId,
    AdapterSpec,
    Demand,
    NodeCapacity,
    PlacementPolicy,
    PlacementProblem,
)

NEVER = -(1 << 60)


@dataclass(frozen=True)
class Cluster:
    """What a placement starts from. `nodes`: those that may get adapters, by id. `held`: where
    adapters that are wanted nowhere are found all the same."""

    nodes: tuple[NodeCapacity, ...]
    held: Mapping[AdapterId, Target]
    forbidden: frozenset[tuple[AdapterId, str]]
    byte_budget: int | None


@dataclass(frozen=True)
class Placing:
    """Adapters whose target changed, and those with another reason for having none."""

    moved: Set[AdapterId] = frozenset()
    explained: Set[AdapterId] = frozenset()
    trouble: str = ""


class Planner:
    def __init__(
        self, settings: Settings, policy: PlacementPolicy, load: LoadModel, catalog: Catalog
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._load = load
        self._catalog = catalog
        self.targets = Targets()
        self.unplaced: dict[AdapterId, str] = {}
        # By base model, as of the last placement.
        self.wanted: dict[str, WantedNodes] = {}
        self.utilisation: dict[str, float] = {}
        self.placements = 0
        self._ranks: dict[str, int] = {}
        self._moved: dict[AdapterId, int] = {}
        self._demand = DemandTracker()
        self._demand.close_window(0.0)
        for spec in catalog.rows().specs:
            self._demand.admit(spec.adapter, spec.max_rank)
        self._planned: dict[AdapterId, Demand] = {}
        self._recent: dict[AdapterId, tuple[float, float]] = {}
        self._not_before: int | None = 0
        self._placed_tick = NEVER

    # Demand

    @property
    def planned(self) -> Mapping[AdapterId, Demand]:
        """Tokens per second that the last placement was made for."""
        return self._planned

    def count(self, adapter: AdapterId, prefill: float, decode: float) -> None:
        self._demand.add(adapter, prefill, decode)
        before = self._recent.get(adapter, (0.0, 0.0))
        self._recent[adapter] = before[0] + prefill, before[1] + decode

    def admit(self, spec: AdapterSpec) -> None:
        self._demand.admit(spec.adapter, spec.max_rank)

    def forget(self, adapter: AdapterId) -> None:
        self._demand.forget(adapter)
        for known in (self.unplaced, self._moved, self._planned, self._recent):
            known.pop(adapter, None)

    # When to place

    def request(self, not_before: int) -> None:
        """A whole placement, at that tick at the earliest."""
        if self._not_before is None or not_before < self._not_before:
            self._not_before = not_before

    def due(self, tick: int) -> bool:
        return self._not_before is not None and max(self._not_before, self._placed_tick + 1) <= tick

    def tick(self, tick: int) -> None:
        """Time passes: an interval ends, or a burst has begun."""
        interval = self._settings.placement_interval_ticks
        if tick % interval == 0:
            self._close_window(tick)
            self._moved = {a: t for a, t in self._moved.items() if tick - t < interval}
            self.request(tick)
        elif tick % self._settings.burst_check_ticks == 0:
            if self._bursts() and tick - self._placed_tick >= self._settings.burst_gap_ticks:
                self._close_window(tick)
                self.request(tick)
            self._recent = {}

    def _close_window(self, tick: int) -> None:
        self._demand.close_window(tick * self._settings.tick_seconds)
        self._recent = {}

    def _bursts(self) -> bool:
        seconds = self._settings.burst_check_ticks * self._settings.tick_seconds
        now = {a: Demand(p / seconds, d / seconds) for a, (p, d) in self._recent.items()}
        found = bursts(now, self._planned, self._settings.burst_times)
        if not found:
            return False
        specs = [s for s in map(self._catalog.current, found) if s is not None]
        rank = np.array([s.max_rank for s in specs], np.int64)
        charges = self._load.charges(
            np.array([s.size_bytes for s in specs], np.int64),
            rank,
            np.array([now[s.adapter].prefill for s in specs]),
            np.array([now[s.adapter].decode for s in specs]),
        )
        return bool((charges.alone(rank) >= self._settings.burst_nodes).any())

    # Placing one

    def settle_one(
        self,
        spec: AdapterSpec,
        nodes: tuple[NodeCapacity, ...],
        forbidden: frozenset[tuple[AdapterId, str]],
    ) -> bool:
        """A home for a new adapter or revision; whether its target changed."""
        adapter, before = spec.adapter, self.targets[spec.adapter]
        self.unplaced.pop(adapter, None)
        self.targets.put(adapter, NOWHERE, 0)
        sites = {n.node_id: self._site(n) for n in nodes}
        wanted = before
        if not stays(spec, before, sites):
            wanted = first_home(spec, sites.values(), forbidden, self._settings.replicas)
            if not wanted.nodes:
                self.unplaced[adapter] = self._why_nowhere(spec, nodes, forbidden)
        for node in wanted.nodes:
            self._ranks[node] = max(self._ranks.get(node, 0), spec.max_rank)
        self.targets.put(adapter, wanted, spec.size_bytes)
        return wanted != before

    def _site(self, node: NodeCapacity) -> Site:
        n = node.node_id
        return Site(
            node,
            self.targets.promised_bytes(n),
            len(self.targets.on_node(n)),
            self._ranks.get(n, 0),
            self.utilisation.get(n, 0.0),
        )

    def _why_nowhere(
        self,
        spec: AdapterSpec,
        nodes: tuple[NodeCapacity, ...],
        forbidden: frozenset[tuple[AdapterId, str]],
    ) -> str:
        problem = PlacementProblem((spec,), nodes, forbidden=forbidden, load=self._load)
        why = self._policy(problem).unplaced.get(spec.adapter)
        return why or f"no node has {spec.size_bytes} bytes of adapter memory left"

    # Placing all

    def place(self, cluster: Cluster, tick: int) -> "Placing":
        """Where placement fails, all stays as it was."""
        self._not_before, self._placed_tick = None, tick
        self.placements += 1
        rows = self._catalog.rows()
        demand = self._demand.demand()
        current = self.targets.all
        if cluster.held:
            current = {**current, **cluster.held}
        limits = ProblemLimits(
            cluster.forbidden, self._settings.replicas, cluster.byte_budget, self._load
        )
        try:
            idle = self._demand.idle()
            p = columns_of_cluster(rows, cluster.nodes, demand, current, limits, idle)
            plan = self._plan(p, cluster, rows, demand, current)
        except LoraServeError as error:
            return Placing(trouble=f"placement failed, all stays where it is: {error}")
        self._planned = demand
        reasons = {rows.adapters[row]: why for row, why in plan.reasons.items()}
        explained = {
            a for a in self.unplaced.keys() | reasons if self.unplaced.get(a) != reasons.get(a)
        }
        self.unplaced = reasons
        moved = self._adopt(p, plan, rows, tick)
        self._note(p, plan)
        return Placing(moved, explained)

    def _plan(
        self,
        p: Columns,
        cluster: Cluster,
        rows: Rows,
        demand: Mapping[AdapterId, Demand],
        current: Mapping[AdapterId, Target],
    ) -> Plan:
        if isinstance(self._policy, ObjectPolicy):
            return self._policy.on_columns(p)
        by_id = {n: i for i, n in enumerate(p.node_ids)}
        placement = self._policy(
            PlacementProblem(
                tuple(rows.specs),
                cluster.nodes,
                demand,
                {a: t.nodes for a, t in current.items()},
                cluster.forbidden,
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

    def _adopt(self, p: Columns, plan: Plan, rows: Rows, tick: int) -> set[AdapterId]:
        changed = set()
        interval = self._settings.placement_interval_ticks
        worth_it = peak(p, p.current) - peak(p, plan.entries) >= self._settings.least_gain
        place = {n: i for i, n in enumerate(p.node_ids)}
        for spec, wanted in changed_targets(p, plan, rows, self.targets):
            adapter, before = spec.adapter, self.targets[spec.adapter]
            if self._may_stay(p, place, rows.row[adapter], before, wanted):
                lately = tick - self._moved.get(adapter, NEVER) < interval
                leaves = not set(before.nodes) <= set(wanted.nodes)
                shrinks = set(wanted.nodes) < set(before.nodes)
                if (leaves and lately) or not (worth_it or shrinks):
                    continue
            if before.nodes and not set(wanted.nodes) <= set(before.nodes):
                self._moved[adapter] = tick
            if self.targets.put(adapter, wanted, spec.size_bytes):
                changed.add(adapter)
        return changed

    @staticmethod
    def _may_stay(
        p: Columns, place: Mapping[str, int], row: int, before: Target, wanted: Target
    ) -> bool:
        """Whether the adapter's copies are within the limits where they are, and as many as the
        plan needs against failures."""
        if not before.nodes or not set(before.nodes) <= place.keys():
            return False
        at = np.array([place[n] for n in before.nodes], np.int64)
        if not p.able(np.full(len(at), row), at).all():
            return False
        return len(before.nodes) >= min(len(wanted.nodes), p.replicas)

    def _note(self, p: Columns, plan: Plan) -> None:
        busy = utilisation(p, plan.entries).tolist() if p.nodes else []
        self.utilisation = dict(zip(p.node_ids, busy, strict=True))
        everything = replace(p, prefill=np.ones(p.adapters)) if p.nodes else p
        ranks = node_ranks(everything, plan.entries).tolist() if p.nodes else []
        active = node_ranks(p, plan.entries).tolist() if p.nodes else []
        self._ranks = {n: a or r for n, a, r in zip(p.node_ids, active, ranks, strict=True)}
        self.wanted = {}
        for row, base in enumerate(p.bases):
            adapters = np.flatnonzero(p.adapter_base == row)
            self.wanted[base] = wanted_nodes(
                part_of(p, adapters, np.flatnonzero(p.node_base == row))
            )
