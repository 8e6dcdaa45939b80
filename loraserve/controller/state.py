"""The controller's core: events in, effects out. No clock, socket, disk or randomness, so that the
daemon, the simulator and the tests run the same file.

Every event marks the adapters that it may concern; only those are looked at again, so that a
heartbeat or a tick costs what changed and not what exists. How an adapter moves: load at the
target, then route to it, then drop at the source (`moves.py`). Invariants:
 - versions of the route table and command ids only rise;
 - every adapter has holders in its route or a reason why it has none.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from loraserve.controller.catalog import MAX_HISTORY as MAX_HISTORY
from loraserve.controller.catalog import Catalog
from loraserve.controller.choice import RouteChoice
from loraserve.controller.events import (
    AdapterAdded,
    AdapterRemoved,
    AdapterUpdated,
    AskRegister,
    AskResidency,
    ComputePlacement,
    Effect,
    Event,
    Heartbeat,
    LinkLost,
    NodeLost,
    NodeRecord,
    NodeRegistered,
    PlacementComputed,
    PlacementFailed,
    PublishRoutes,
    SavePlacement,
    TellOperator,
    Tick,
)
from loraserve.controller.failures import LoadFailures
from loraserve.controller.membership import CopyKey, Heard, Membership, Node
from loraserve.controller.moves import Moves
from loraserve.controller.peers import READ_MEMORY_TICKS, PeerChoice
from loraserve.controller.placing import PlacementAnswer, solve
from loraserve.controller.planner import Cluster, Planner
from loraserve.controller.reports import Reports
from loraserve.controller.residency import Residency
from loraserve.controller.routes import NodeRoute, RouteWriter
from loraserve.controller.settings import Settings as Settings
from loraserve.controller.targets import NOWHERE, target
from loraserve.controller.timers import Timers
from loraserve.controller.view import StateView
from loraserve.errors import FailedPreconditionError
from loraserve.placement.load import LoadModel, default_load_model
from loraserve.placement.types import (
    AdapterId,
    AdapterSpec,
    NodeCapacity,
    PlacementPolicy,
    in_order,
)

# Placement intervals after which a failed load is tried afresh.
FAILURE_MEMORY_INTERVALS = 10


class ControllerState(StateView):
    """One epoch of the controller. `step` is the only way in; what it raises changed nothing."""

    def __init__(
        self,
        settings: Settings,
        policy: PlacementPolicy,
        epoch: int,
        histories: Iterable[tuple[AdapterSpec, ...]] = (),
        placement: Mapping[AdapterId, tuple[str, ...]] | None = None,
        shares: Mapping[AdapterId, tuple[float, ...]] | None = None,
        load: LoadModel | None = None,
        defers_placement: bool = False,
    ) -> None:
        """`histories`: of each adapter its revisions, newest first; the first is what the name
        points to. `placement` and `shares`: those saved last. `load`: what demands cost; where
        its profile names a base, nodes of another one are refused. `defers_placement`: whole
        placements are asked for (ComputePlacement), and adopted when the answer comes
        (PlacementComputed); else they are made within the step."""
        self._settings = settings
        self._defers_placement = defers_placement
        self._tick = 0
        self._catalog = Catalog(histories)
        self._members = Membership()
        self._failures = LoadFailures()
        self._timers = Timers()
        self._reports = Reports(self._catalog)
        load = load or default_load_model()
        self._profile_base = load.profile.base
        self._planner = Planner(settings, policy, load, self._catalog)
        self._targets = self._planner.targets
        self._peers = PeerChoice(self._members)
        self._moves = Moves(
            *(settings, self._catalog, self._members, self._targets, self._failures),
            *(self._timers, self._peers),
        )
        self._choice = RouteChoice(self._catalog, self._members, self._planner, self._failures)
        self._writer = RouteWriter(epoch)
        for adapter, nodes in (placement or {}).items():
            spec = self._catalog.current(adapter)
            if spec is not None:
                wanted = target(nodes, (shares or {}).get(adapter, ()))
                self._targets.put(adapter, wanted, spec.size_bytes)
        self._awaited = self._targets.nodes()
        self._dirty = set(self._catalog)
        self._dirty_nodes: set[str] = set()
        self._unsaved: set[AdapterId] = set()

    # Events

    def step(self, event: Event) -> list[Effect]:
        """Takes one event; the effects are to be carried out in their order.

        Raises AlreadyExistsError, NotFoundError (adapters), FailedPreconditionError (a node's stale
        incarnation, another cluster's epoch, a base that the profile is not of) and
        InvalidArgumentError (values that cannot be)."""
        effects: list[Effect] = []
        match event:
            case NodeRegistered(record, heard_epoch):
                self._register(record, heard_epoch)
            case Heartbeat():
                effects += self._hear(event)
            case LinkLost(node_id, incarnation):
                unlinked = self._members.unlink(node_id, incarnation, self._tick)
                if unlinked is not None:
                    self._dirty |= unlinked.revisions.keys()
            case AdapterAdded(spec):
                self._catalog.add(spec)
                self._planner.admit(spec)
                self._settle(spec)
            case AdapterUpdated(spec):
                self._catalog.update(spec)
                self._failures.forget_adapter(spec.adapter)
                self._planner.admit(spec)
                self._settle(spec)
            case AdapterRemoved(adapter):
                self._catalog.remove(adapter)
                self._failures.forget_adapter(adapter)
                self._planner.forget(adapter)
                if self._targets.put(adapter, NOWHERE, 0):
                    self._unsaved.add(adapter)
                self._dirty.add(adapter)
            case Tick():
                effects += self._advance()
            case PlacementComputed(answer):
                effects += self._adopt(answer)
            case PlacementFailed(question, why):
                placing = self._planner.fail(question, why, self._tick)
                effects += _told(placing.trouble)
        return effects + self._reconcile()

    def _register(self, record: NodeRecord, heard_epoch: int) -> None:
        if heard_epoch > self.epoch:
            self._reports.count("epoch of another controller")
            raise FailedPreconditionError(
                "heard_epoch",
                f"{heard_epoch}, and this controller's is {self.epoch}: another one's?",
            )
        if self._profile_base and record.base != self._profile_base:
            self._reports.count("base without a profile")
            raise FailedPreconditionError(
                "base",
                f"{record.base!r}, and this controller places by a profile of "
                f"{self._profile_base!r}",
            )
        known = self.nodes.get(record.node_id)
        returns = known is not None and not known.heard
        again = known is not None and known.record == record
        replaced = self._members.register(record, self._tick)
        node_id = record.node_id
        if replaced is not None:
            self._dirty |= replaced.revisions.keys() | self._targets.on_node(node_id)
        if again:
            # What was sent with the old stream is not on its way any more.
            self._dirty |= self._targets.on_node(node_id)
            if known is not None and returns:
                self._dirty |= known.revisions.keys()
            return
        # What it is to hold is looked at when it has said what it holds.
        self._dirty |= self._failures.forget_node(node_id)
        self._dirty_nodes.add(node_id)
        self._planner.request(self._tick + 1)  # nodes come together

    def _hear(self, beat: Heartbeat) -> list[Effect]:
        if beat.epoch not in (0, self.epoch):
            self._reports.count("epoch of another controller")
            return [AskRegister(beat.node_id, beat.incarnation)]
        beat = self._reports.applied(beat, self._moves.last_command)
        heard = self._members.hear(beat, self._reports.copies(beat), self._tick)
        if heard is None:
            self._reports.count("node that is not registered")
            return [AskRegister(beat.node_id, beat.incarnation)]
        for sample in self._reports.demand(beat):
            self._planner.count(sample.adapter, sample.prefill_tokens, sample.decode_tokens)
        self._note(beat, heard)
        return [AskResidency(beat.node_id, beat.incarnation)] if heard.gap else []

    def _note(self, beat: Heartbeat, heard: Heard) -> None:
        node = heard.node
        self._dirty.update(key[0] for key in (*heard.changed, *heard.released))
        if heard.first_report and node.reported:
            self._dirty |= self._targets.on_node(beat.node_id)
        if heard.drains:
            self._dirty |= node.revisions.keys() | self._targets.on_node(beat.node_id)
            self._dirty_nodes.add(beat.node_id)
            self._planner.request(self._tick)
        if heard.roomier:
            self._dirty.update(key[0] for key in node.cramped)
        for key, was in heard.changed.items():
            copy = node.copies.get(key)
            self._peers.reported(beat.node_id, key, copy)
            if copy is None or (was is not None and was.state is copy.state):
                continue
            if copy.state is Residency.FAILED:
                self._fail(node, key, copy.error, copy.refused)
            if was is None and self.revision(*key) is None:
                self._reports.count("copy of an unknown revision")
        by_id = {sent.command_id: key for key, sent in node.loads.items()} if beat.failed else {}
        for command_id, why in beat.failed:
            if command_id in by_id:
                self._fail(node, by_id[command_id], why)

    def _fail(self, node: Node, key: CopyKey, why: str, refused: bool = False) -> None:
        node.forget_load(key)
        self._peers.end(node.record.node_id, key)
        self._dirty.add(key[0])
        if key[0] in self._catalog and self._failures.record(
            node.record.node_id, key, why, self._tick, refused
        ):
            self._planner.request(self._tick)

    def _advance(self) -> list[Effect]:
        self._tick += 1
        self._peers.forget_before(self._tick - READ_MEMORY_TICKS)
        settings = self._settings
        for node in self._members.fall_quiet(self._tick, settings.quiet_ticks):
            self._dirty |= node.revisions.keys()
        lost = self._members.expire(self._tick, settings.silent_ticks, settings.unlinked_ticks)
        for node in lost:
            node_id = node.record.node_id
            self._dirty |= node.revisions.keys() | self._targets.on_node(node_id)
            self._dirty |= self._failures.forget_node(node_id)
            self._dirty_nodes.add(node_id)
            self._planner.request(self._tick)
        self._dirty |= self._timers.due(self._tick)
        interval = settings.placement_interval_ticks
        if self._tick % interval == 0:
            oldest = self._tick - FAILURE_MEMORY_INTERVALS * interval
            self._dirty |= self._failures.forget_before(oldest) | self._moves.new_interval()
        self._planner.tick(self._tick, bool(self._strain()))
        overdue = self._planner.give_up_overdue(self._tick)
        return [*(NodeLost(n.record.node_id, n.record.incarnation) for n in lost), *_told(overdue)]

    # Placement

    def _usable(self) -> tuple[NodeCapacity, ...]:
        """Nodes that may get adapters. Where there are fewer failure domains than replicas, a copy
        in the same domain is better than none: every node counts as a domain of its own."""
        found = [n.capacity for _, n in sorted(self.nodes.items()) if not n.draining]
        domains = Counter((n.base, n.domain) for n in found)
        several = Counter(base for base, domain in domains if domain)
        several.update(n.base for n in found if not n.domain)
        few = {base for base, count in several.items() if count < self._settings.replicas}
        return tuple(replace(n, domain="") if n.base in few else n for n in found)

    def _strain(self) -> dict[str, float]:
        """Of nodes that are heard and where more waits than the SLO allows: the part of an interval
        that they need for it."""
        strain = (
            (node_id, self._planner.strain(n.capacity, n.waiting_tokens))
            for node_id, n in self.nodes.items()
            if n.waiting_tokens and n.heard and not n.draining
        )
        return {node_id: part for node_id, part in strain if part}

    def _settle(self, spec: AdapterSpec) -> None:
        """A home for what is new."""
        self._dirty.add(spec.adapter)
        if self.settling:
            self._planner.request(self._tick)
            return
        forbidden = self._failures.forbidden_for(spec.adapter)
        if self._planner.settle_one(spec, self._usable(), forbidden):
            self._unsaved.add(spec.adapter)

    def _place(self) -> list[Effect]:
        held = {}
        if len(self._targets.all) < len(self._catalog):
            for adapter in self._catalog:
                if adapter not in self._targets.all and (copies := self.copies(adapter)):
                    held[adapter] = target(tuple(n for n, _ in copies))
        cluster = Cluster(
            self._usable(),
            held,
            self._failures.forbidden(),
            self._moves.budget_left(),
            self._strain(),
        )
        question = self._planner.question(cluster, self._tick)
        if self._defers_placement:
            return [ComputePlacement(question)]
        return self._adopt(solve(question))

    def _adopt(self, answer: PlacementAnswer) -> list[Effect]:
        before = dict(self.wanted)
        try:
            placing = self._planner.adopt(
                answer, self._usable(), self._failures.forbidden(), self._tick
            )
        except Exception:
            # Whatever it had taken over by then is looked at all the same.
            self._dirty |= set(self._catalog)
            raise
        self._dirty |= placing.moved | placing.explained
        self._unsaved |= placing.moved
        told = _told(placing.trouble)
        for base, wanted in self.wanted.items():
            if base not in before or before[base].nodes != wanted.nodes:
                told.append(TellOperator(f"base {base!r}: {wanted.reason}"))
        return told

    def _save(self) -> list[Effect]:
        """The targets that changed."""
        changed, self._unsaved = self._unsaved, set()
        if not changed:
            return []
        targets = {a: self._targets[a] for a in in_order(changed)}
        return [
            SavePlacement(
                {a: t.nodes for a, t in targets.items() if t.nodes},
                {a: t.shares for a, t in targets.items() if t.nodes},
                tuple(a for a, t in targets.items() if not t.nodes),
            )
        ]

    # Reconciliation: what is wanted against what the nodes report

    def _reconcile(self) -> list[Effect]:
        effects: list[Effect] = []
        if self._planner.due(self._tick) and not self.settling:
            effects += self._place()
        if not self._dirty and not self._dirty_nodes:
            return effects
        effects += self._save()
        dirty, self._dirty = in_order(self._dirty), set()
        effects += self._moves.loads(dirty, self._tick, self._worth)
        effects += self._publish(dirty)
        for adapter in dirty:
            effects += self._moves.drops(adapter, self.routes.adapters.get(adapter), self._tick)
        return effects

    def _worth(self, adapter: AdapterId) -> float:
        rate = self._planner.planned.get(adapter)
        return rate.prefill + rate.decode if rate else 0.0

    def _publish(self, dirty: list[AdapterId]) -> list[Effect]:
        nodes, self._dirty_nodes = self._dirty_nodes, set()
        changes: dict[str, NodeRoute | None] = {
            n: self._choice.of_node(self.nodes[n]) if n in self.nodes else None for n in nodes
        }
        delta = self._writer.write({a: self._choice.route(a) for a in dirty}, changes)
        return [PublishRoutes(self.routes.version, delta)] if delta else []


def _told(trouble: str) -> list[Effect]:
    return [TellOperator(trouble, True)] if trouble else []
