"""What should be where: demand, the placement policy, and how many nodes would be right.

A whole placement costs O(adapters) and happens once an interval, when nodes come or go, and on a
burst; at most once a tick. One new adapter is given a home beside what stands. Hysteresis, beside
that of the policy: a plan that lowers the predicted peak by too little moves nothing that may stay,
and an adapter that was moved stays where it is for an interval, though it may get more copies.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np

from loraserve.controller.asked import AskedPlacement
from loraserve.controller.catalog import Catalog
from loraserve.controller.home import Site, first_home, stays
from loraserve.controller.placing import PlacementAnswer, PlacementQuestion, Since
from loraserve.controller.problem import ProblemLimits
from loraserve.controller.settings import Settings
from loraserve.controller.surges import Surges
from loraserve.controller.targets import NOWHERE, Target, Targets
from loraserve.placement.autoscale import WantedNodes
from loraserve.placement.columns import Columns, peak
from loraserve.placement.demand import DemandTracker
from loraserve.placement.load import LoadModel
from loraserve.placement.operating_point import MAX_RANK
from loraserve.placement.types import (
    AdapterId,
    AdapterSpec,
    Demand,
    NodeCapacity,
    PlacementPolicy,
    PlacementProblem,
    in_order,
)

NEVER = -(1 << 60)


@dataclass(frozen=True)
class Cluster:
    """What a placement starts from. `nodes`: those that may get adapters, by id. `held`: where
    adapters that are wanted nowhere are found all the same. `strain`: by node, the part of it that
    requests which wait there take."""

    nodes: tuple[NodeCapacity, ...]
    held: Mapping[AdapterId, Target]
    forbidden: frozenset[tuple[AdapterId, str]]
    byte_budget: int | None
    strain: Mapping[str, float]


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
        self._demand = DemandTracker(settings.placement_interval_ticks * settings.tick_seconds)
        self._demand.close_window(0.0)
        for spec in catalog.specs():
            self._demand.admit(spec.adapter, spec.max_rank)
        self._surges = Surges(settings, load, catalog.current)
        self._asked = AskedPlacement(settings.answer_ticks)
        self._not_before: int | None = 0
        self._placed_tick = NEVER

    # Demand

    @property
    def planned(self) -> Mapping[AdapterId, Demand]:
        """Tokens per second that the last placement was made for."""
        return self._surges.planned

    def count(self, adapter: AdapterId, prefill: float, decode: float) -> None:
        self._surges.count(adapter, prefill, decode)

    def admit(self, spec: AdapterSpec) -> None:
        self._asked.touched.add(spec.adapter)
        self._demand.admit(spec.adapter, spec.max_rank)

    def forget(self, adapter: AdapterId) -> None:
        self._asked.touched.add(adapter)
        self._demand.forget(adapter)
        self._surges.forget(adapter)
        for known in (self.unplaced, self._moved):
            known.pop(adapter, None)

    # When to place

    def request(self, not_before: int) -> None:
        """A whole placement, at that tick at the earliest."""
        if self._not_before is None or not_before < self._not_before:
            self._not_before = not_before

    def due(self, tick: int) -> bool:
        if self._not_before is None or self._asked.question is not None:
            return False
        return max(self._not_before, self._placed_tick + 1) <= tick

    def tick(self, tick: int, strained: bool = False) -> None:
        """Time passes: an interval ends, or a burst has begun. `strained`: a node has more requests
        waiting than it should; what is placed now makes up for it."""
        settings = self._settings
        interval = settings.placement_interval_ticks
        if tick % interval == 0:
            self._gather()
            self._demand.close_window(tick * settings.tick_seconds)
            self._moved = {a: t for a, t in self._moved.items() if tick - t < interval}
            self.request(tick)
        elif tick % settings.burst_check_ticks == 0:
            if tick - self._placed_tick >= settings.burst_gap_ticks:
                if self._surges.found():
                    # What came before the burst says nothing of it: a window of its own.
                    began = tick - settings.burst_check_ticks
                    if began * settings.tick_seconds > self._demand.closed_s:
                        self._demand.close_window(began * settings.tick_seconds)
                    self._gather()
                    self._demand.close_window(tick * settings.tick_seconds)
                    self.request(tick)
                elif strained:
                    self.request(tick)
            self._gather()

    def strain(self, node: NodeCapacity, waiting_tokens: int) -> float:
        """The part of an interval that the node needs for requests with so many prompt tokens, at
        its operating point; 0 where they still get their first token within the SLO."""
        mix, points = self._load.mix, self._load.points
        rank = min(self._ranks.get(node.node_id, 0), MAX_RANK)
        rate = float(points.tokens_per_s[rank]) or 1.0
        able = float(self._load.capacity(np.array([node.speed]))[0])
        wait_s = waiting_tokens * (1 + mix.output / mix.prompt) / (rate * able)
        if wait_s <= self._load.slo.ttft_p95_s:
            return 0.0
        settings = self._settings
        return min(
            settings.most_strain,
            wait_s / (settings.placement_interval_ticks * settings.tick_seconds),
        )

    def _gather(self) -> None:
        for adapter, (prefill, decode, requests) in self._surges.take().items():
            self._demand.add(adapter, prefill, decode, requests)

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

    def question(self, cluster: Cluster, tick: int) -> PlacementQuestion:
        """What `adopt` wants the answer to. Until then `due` asks for nothing else."""
        self._not_before, self._placed_tick = None, tick
        self.placements += 1
        gone = self.targets.nodes() - {n.node_id for n in cluster.nodes}
        displaced = set(cluster.held).union(*(self.targets.on_node(n) for n in gone))
        limits = ProblemLimits(
            cluster.forbidden, self._settings.replicas, cluster.byte_budget, self._load
        )
        asked = PlacementQuestion(
            self._policy,
            self._catalog.rows(),
            cluster.nodes,
            cluster.strain,
            self._demand.demand(),
            self._demand.idle(),
            {**self.targets.all, **cluster.held},
            displaced,
            limits,
        )
        self._asked.ask(asked, tick)
        return asked

    @property
    def failed(self) -> Mapping[str, int]:
        """Placements that came to nothing, by reason."""
        return self._asked.failures

    def give_up_overdue(self, tick: int) -> str:
        """Asks again where an answer does not come; the trouble, or nothing."""
        waited = self._asked.give_up_overdue(tick)
        if not waited:
            return ""
        self.request(tick)
        return f"a placement was not computed in {waited} ticks; asking for another"

    def fail(self, question: PlacementQuestion, why: str, tick: int) -> "Placing":
        """There is no answer. Asks again in a while, as what is wrong may pass."""
        if question is not self._asked.question:
            return Placing()
        self._asked.answered("error")
        self.request(tick + self._settings.burst_gap_ticks)
        return Placing(trouble=f"placement failed, all stays where it is: {why}")

    def adopt(
        self,
        answer: PlacementAnswer,
        nodes: tuple[NodeCapacity, ...],
        forbidden: frozenset[tuple[AdapterId, str]],
        tick: int,
    ) -> "Placing":
        """Takes over what of the answer still holds; `nodes` and `forbidden` are those of now.
        Where placement failed, all stays as it was."""
        if answer.question is not self._asked.question:
            return Placing()
        if answer.columns is None:
            self._asked.answered("policy")
            return Placing(trouble=answer.trouble)
        touched = self._asked.touched
        planned = dict(answer.question.demand)
        rows = answer.question.rows
        reasons = {rows.adapters[row]: why for row, why in answer.plan.reasons.items()}
        for adapter in touched:
            reasons.pop(adapter, None)
            if adapter in self.unplaced:
                reasons[adapter] = self.unplaced[adapter]
            if adapter not in self._catalog:
                planned.pop(adapter, None)
        self._surges.plan(planned, answer.columns)
        explained = {
            a for a in self.unplaced.keys() | reasons if self.unplaced.get(a) != reasons.get(a)
        }
        self.unplaced = reasons
        moved = self._adopt(answer, Since(answer.question, nodes, forbidden), touched, tick)
        self.utilisation, self._ranks = dict(answer.utilisation), dict(answer.ranks)
        self.wanted = dict(answer.wanted)
        moved |= self._make_room(touched, nodes, forbidden)
        self._asked.answered()
        return Placing(moved, explained)

    def _make_room(
        self,
        touched: Set[AdapterId],
        nodes: tuple[NodeCapacity, ...],
        forbidden: frozenset[tuple[AdapterId, str]],
    ) -> set[AdapterId]:
        """Other homes for what came meanwhile to nodes that the plan, which did not know of it,
        has filled."""
        memory = {n.node_id: n.adapter_memory_bytes for n in nodes}
        moved = set()
        for adapter in in_order(touched):
            spec = self._catalog.current(adapter)
            full = any(
                self.targets.promised_bytes(n) > memory.get(n, 0)
                for n in self.targets[adapter].nodes
            )
            if spec is not None and full and self.settle_one(spec, nodes, forbidden):
                moved.add(adapter)
        return moved

    def _adopt(
        self, answer: PlacementAnswer, since: Since, touched: Set[AdapterId], tick: int
    ) -> set[AdapterId]:
        p, plan, rows = answer.columns, answer.plan, answer.question.rows
        assert p is not None
        changed = set()
        interval = self._settings.placement_interval_ticks
        now, least = peak(p, p.current), self._settings.least_gain
        gain = now - peak(p, plan.entries)
        # Other shares for the copies that are there cost no bytes: even a cluster with little to do
        # has them. Where nobody has asked for anything, as after a restart, nothing is known.
        known = now > 0
        worth_it, worth_shares = gain >= least, known and gain >= least * min(1.0, now)
        place = {n: i for i, n in enumerate(p.node_ids) if n in since.nodes}
        for spec, planned in answer.changes:
            adapter, before = spec.adapter, self.targets[spec.adapter]
            wanted = since.possible(adapter, planned)
            if adapter in touched or (planned.nodes and not wanted.nodes):
                continue
            if self._may_stay(p, place, rows.row[adapter], before, wanted):
                lately = tick - self._moved.get(adapter, NEVER) < interval
                leaves = not set(before.nodes) <= set(wanted.nodes)
                shrinks = known and set(wanted.nodes) < set(before.nodes)
                stays = set(wanted.nodes) == set(before.nodes)
                worth = worth_shares if stays else worth_it or shrinks
                if (leaves and lately) or not worth:
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
