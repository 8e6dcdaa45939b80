"""The controller's core: events in, effects out. No clock, socket, disk or randomness, so that the
daemon, the simulator and the tests run the same file.

How an adapter moves: load at the target, then route to it, then drop at the source. Invariants:
 - a copy is dropped only if it has been out of the published routes for `drop_delay_ticks` and the
   adapter's route is not empty, so that the last copy that serves never goes;
 - versions of the route table and command ids only rise;
 - every adapter has holders in its route or a reason why it has none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraserve.controller.demand import DemandMeter
from loraserve.controller.events import (
    AdapterAdded,
    AdapterRemoved,
    AdapterUpdated,
    AskRegister,
    Copy,
    Effect,
    Event,
    Heartbeat,
    NodeLost,
    NodeRegistered,
    PublishRoutes,
    Residency,
    SavePlacement,
    SendDrop,
    SendLoad,
    Tick,
)
from loraserve.controller.failures import LoadFailures
from loraserve.controller.membership import CopyKey, Membership, Node, SentDrop, SentLoad
from loraserve.controller.routes import (
    WHOLE_WEIGHT,
    AdapterRoute,
    NodeRoute,
    RevisionRoute,
    RouteHolder,
    RouteTable,
    difference,
)
from loraserve.errors import AlreadyExistsError, NotFoundError
from loraserve.placement.types import (
    AdapterId,
    AdapterSpec,
    PlacementPolicy,
    PlacementProblem,
)

# Revisions of a name that can be served or returned to.
MAX_HISTORY = 8
# Placement intervals after which a failed load is tried afresh.
FAILURE_MEMORY_INTERVALS = 10


@dataclass(frozen=True)
class Settings:
    """Times are in ticks of `tick_seconds`."""

    tick_seconds: float = 1.0
    # Silence for longer than this: the node is lost.
    silent_ticks: int = 3
    placement_interval_ticks: int = 60
    # A command whose effect does not show for so long is sent again.
    patience_ticks: int = 3
    # From the route's disappearance to the drop: clients hear of new routes within it.
    drop_delay_ticks: int = 2
    # After a restart, how long the stored placement waits for its nodes.
    settle_ticks: int = 5
    replicas: int = 1


class ControllerState:
    """One epoch of the controller. `step` is the only way in; what it raises changed nothing."""

    def __init__(
        self,
        settings: Settings,
        policy: PlacementPolicy,
        epoch: int,
        histories: Iterable[tuple[AdapterSpec, ...]] = (),
        placement: Mapping[AdapterId, tuple[str, ...]] | None = None,
    ) -> None:
        """`histories`: of each adapter its revisions, newest first; the first is what the name
        points to. `placement`: the one saved last."""
        self._settings = settings
        self._policy = policy
        self._tick = 0
        self._next_command = 1
        self._histories = {h[0].adapter: h for h in histories}
        self._desired = {a: n for a, n in (placement or {}).items() if a in self._histories}
        self._awaited = {n for nodes in self._desired.values() for n in nodes}
        self._shares: Mapping[AdapterId, tuple[float, ...]] = {}
        self._weights: dict[AdapterId, dict[str, int]] = {}
        self._unplaced: Mapping[AdapterId, str] = {}
        self._must_place = True
        self._members = Membership()
        self._failures = LoadFailures()
        self._unrouted_since: dict[tuple[str, CopyKey], int] = {}
        self._demand = DemandMeter()
        self.routes = RouteTable(epoch, 0)

    # What the shell may read

    @property
    def epoch(self) -> int:
        return self.routes.epoch

    @property
    def nodes(self) -> Mapping[str, Node]:
        return self._members.nodes

    def current(self, adapter: AdapterId) -> AdapterSpec | None:
        history = self._histories.get(adapter)
        return history[0] if history else None

    def revision(self, adapter: AdapterId, revision: str) -> AdapterSpec | None:
        """The revision of the name, current or earlier."""
        specs = self._histories.get(adapter, ())
        return next((s for s in specs if s.revision == revision), None)

    def copies(self, adapter: AdapterId) -> list[tuple[str, Copy]]:
        """(node id, copy) of every copy of the current revision, by node id."""
        spec = self.current(adapter)
        key = (adapter, spec.revision if spec else "")
        return [(i, n.copies[key]) for i, n in sorted(self.nodes.items()) if key in n.copies]

    def step(self, event: Event) -> list[Effect]:
        """Takes one event; the effects are to be carried out in their order.

        Raises AlreadyExistsError, NotFoundError (adapters) and FailedPreconditionError (a node's
        stale incarnation)."""
        effects: list[Effect] = []
        match event:
            case NodeRegistered(record):
                if not self._members.register(record, self._tick):
                    return []
                self._failures.forget_node(record.node_id)
                self._must_place = True
            case Heartbeat():
                node, changed = self._hear(event)
                if node is None:
                    return [AskRegister(event.node_id, event.incarnation)]
                if not changed:
                    return []
            case AdapterAdded(spec):
                if spec.adapter in self._histories:
                    raise AlreadyExistsError("adapter", f"{spec.adapter} exists")
                self._histories[spec.adapter] = (spec,)
                self._must_place = True
            case AdapterUpdated(spec):
                self._update(spec)
            case AdapterRemoved(adapter):
                if self._histories.pop(adapter, None) is None:
                    raise NotFoundError("adapter", f"{adapter} does not exist")
                self._failures.forget_adapter(adapter)
                self._demand.forget(adapter)
                self._must_place = True
            case Tick():
                effects += self._advance()
                if not effects and not self._time_matters():
                    return []
        return effects + self._reconcile()

    # Events

    def _update(self, spec: AdapterSpec) -> None:
        if spec.adapter not in self._histories:
            raise NotFoundError("adapter", f"{spec.adapter} does not exist")
        earlier = [s for s in self._histories[spec.adapter] if s.revision != spec.revision]
        self._histories[spec.adapter] = (spec, *earlier)[:MAX_HISTORY]
        self._failures.forget_adapter(spec.adapter)
        self._must_place = True

    def _hear(self, beat: Heartbeat) -> tuple[Node | None, bool]:
        known = self.nodes.get(beat.node_id)
        before = dict(known.copies) if known else {}
        was_draining = known.draining if known else False
        node, changed = self._members.hear(beat, self._tick)
        if node is None:
            return None, False
        for sample in beat.demand:
            if sample.adapter in self._histories:
                self._demand.add(sample.adapter, sample.prefill_tokens, sample.decode_tokens)
        for key, copy in node.copies.items():
            was = before.get(key)
            if copy.state is Residency.FAILED and (was is None or was.state is not copy.state):
                self._fail(node, key, copy.error)
        by_id = {sent.command_id: key for key, sent in node.loads.items()}
        for command_id, why in beat.failed:
            if command_id in by_id:
                self._fail(node, by_id[command_id], why)
                changed = True
        if node.draining != was_draining:
            self._must_place = True
        return node, changed

    def _fail(self, node: Node, key: CopyKey, why: str) -> None:
        node.loads.pop(key, None)
        if self._failures.record(node.record.node_id, key, why, self._tick):
            self._must_place = True

    def _advance(self) -> list[Effect]:
        self._tick += 1
        lost = self._members.expire(self._tick, self._settings.silent_ticks)
        for node in lost:
            self._failures.forget_node(node.record.node_id)
        interval = self._settings.placement_interval_ticks
        if self._tick % interval == 0:
            self._demand.close_window(interval * self._settings.tick_seconds)
            self._failures.forget_before(self._tick - FAILURE_MEMORY_INTERVALS * interval)
            self._must_place = True
        self._must_place = self._must_place or bool(lost)
        return [NodeLost(n.record.node_id, n.record.incarnation) for n in lost]

    # Reconciliation: what is wanted against what the nodes report

    def _reconcile(self) -> list[Effect]:
        effects: list[Effect] = []
        if self._must_place and not self._settling():
            effects += self._place()
        return effects + self._send_loads() + self._publish() + self._send_drops()

    def _time_matters(self) -> bool:
        """Whether a later tick alone can change what `_reconcile` does."""
        return (
            self._must_place
            or bool(self._failures or self._unrouted_since)
            or any(node.loads or node.drops for node in self.nodes.values())
        )

    def _settling(self) -> bool:
        if self._tick >= self._settings.settle_ticks:
            return False
        return any(n not in self.nodes or not self.nodes[n].reported for n in self._awaited)

    def _place(self) -> list[Effect]:
        held = {a: tuple(n for n, _ in self.copies(a)) for a in self._histories}
        problem = PlacementProblem(
            adapters=tuple(h[0] for _, h in sorted(self._histories.items())),
            nodes=tuple(n.capacity for _, n in sorted(self.nodes.items()) if not n.draining),
            demand=self._demand.rates,
            current={a: self._desired.get(a) or held[a] for a in self._histories},
            forbidden=self._failures.forbidden(),
            replicas=self._settings.replicas,
            current_shares=self._shares,
        )
        placement = self._policy(problem)
        self._must_place = False
        self._unplaced = placement.unplaced
        self._shares = placement.shares
        self._weights = {a: placement.weights(a, WHOLE_WEIGHT) for a in placement.holders}
        if placement.holders == self._desired:
            return []
        self._desired = dict(placement.holders)
        return [SavePlacement(dict(self._desired))]

    def _send_loads(self) -> list[Effect]:
        effects: list[Effect] = []
        for adapter, holders in sorted(self._desired.items()):
            spec = self.current(adapter)
            for node in (self.nodes.get(n) for n in holders):
                if spec is None or node is None or not node.reported or node.draining:
                    continue
                if self._wants_load(node, (adapter, spec.revision)):
                    command = self._command()
                    sent = SentLoad(command, self._tick, spec)
                    node.loads[adapter, spec.revision] = sent
                    effects.append(SendLoad(node.record.node_id, command, spec))
        return effects

    def _wants_load(self, node: Node, key: CopyKey) -> bool:
        node_id = node.record.node_id
        copy = node.copies.get(key)
        present = copy is not None and copy.state not in (Residency.FAILED, Residency.DRAINING)
        if present and key not in node.drops:
            if copy is not None and copy.state.serves:
                self._failures.succeeded(node_id, key)
            return False
        sent = node.loads.get(key)
        if sent is not None and self._tick - sent.tick < self._settings.patience_ticks:
            return False
        return self._failures.may_retry(node_id, key, self._tick)

    def _command(self) -> int:
        self._next_command += 1
        return self._next_command - 1

    def _serving(self, key: CopyKey) -> list[tuple[str, Copy]]:
        """Copies that new requests may go to."""
        return [
            (node_id, node.copies[key])
            for node_id, node in sorted(self.nodes.items())
            if not node.draining
            and key in node.copies
            and node.copies[key].state.serves
            and key not in node.drops
        ]

    def _route(self, adapter: AdapterId) -> AdapterRoute:
        for spec in self._histories[adapter]:
            serving = self._serving((adapter, spec.revision))
            if not serving:
                continue
            wanted = self._desired.get(adapter, ())
            chosen = [(n, c) for n, c in serving if n in wanted]
            # Until every target serves, those that are to go help on.
            if len(chosen) < max(1, len(wanted)):
                chosen = serving
            weights = self._weights.get(adapter, {})
            holders = tuple(
                RouteHolder(n, weights.get(n, WHOLE_WEIGHT), c.state) for n, c in chosen
            )
            route = RevisionRoute(spec.revision, holders, spec.max_rank, spec.size_bytes)
            return AdapterRoute(adapter, spec.revision, (route,))
        return AdapterRoute(adapter, self._histories[adapter][0].revision, (), self._why(adapter))

    def _why(self, adapter: AdapterId) -> str:
        """Why no node serves the adapter; never empty."""
        spec = self._histories[adapter][0]
        failed = self._failures.why((adapter, spec.revision))
        if failed:
            return failed
        if adapter in self._unplaced:
            return self._unplaced[adapter]
        wanted = self._desired.get(adapter, ())
        present = [n for n in wanted if n in self.nodes]
        if present:
            return f"loading on {', '.join(present)}"
        return f"waiting for {', '.join(wanted)}" if wanted else "waiting for placement"

    def _publish(self) -> list[Effect]:
        nodes = {
            i: NodeRoute(
                i,
                n.record.address,
                n.draining,
                n.record.incarnation,
                n.record.base,
                n.record.base_digest,
            )
            for i, n in self.nodes.items()
        }
        adapters = {a: self._route(a) for a in self._histories}
        table = RouteTable(self.epoch, self.routes.version + 1, adapters, nodes)
        if not difference(self.routes, table):
            return []
        self.routes = table
        return [PublishRoutes(table.version)]

    def _send_drops(self) -> list[Effect]:
        effects: list[Effect] = []
        unrouted: dict[tuple[str, CopyKey], int] = {}
        for node_id, node in sorted(self.nodes.items()):
            for key, copy in sorted(node.copies.items(), key=lambda item: item[0]):
                if node.draining or not self._superfluous(node_id, key):
                    continue
                since = self._unrouted_since.get((node_id, key), self._tick)
                unrouted[node_id, key] = since
                if self._tick - since < self._settings.drop_delay_ticks:
                    continue
                sent = node.drops.get(key)
                waiting = sent and self._tick - sent.tick < self._settings.patience_ticks
                if copy.state is Residency.DRAINING or waiting:
                    continue
                command = self._command()
                node.drops[key] = SentDrop(command, self._tick)
                effects.append(SendDrop(node_id, command, *key))
        self._unrouted_since = unrouted
        return effects

    def _superfluous(self, node_id: str, key: CopyKey) -> bool:
        """Whether the copy is neither wanted nor routed, and others serve its adapter."""
        adapter, revision = key
        spec = self.current(adapter)
        if spec is None:
            return True  # removed from the cluster: nothing of it stays
        if revision == spec.revision and node_id in self._desired.get(adapter, ()):
            return False
        routes = self.routes.adapters[adapter].revisions
        routed = {(r.revision, h.node_id) for r in routes for h in r.holders}
        return bool(routed) and (revision, node_id) not in routed
