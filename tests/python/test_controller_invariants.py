"""The controller's core against simulated nodes that lose commands, die, drain and fail to load.

Whatever happens: the last copy is never dropped, versions and command ids rise, every adapter has
a route or a reason; and when the faults stop, everything placed is served and nothing is left over.
"""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraserve.controller.events import (
    AdapterAdded,
    AdapterRemoved,
    AdapterUpdated,
    Copy,
    Effect,
    Event,
    Heartbeat,
    NodeRecord,
    NodeRegistered,
    PublishRoutes,
    Residency,
    SavePlacement,
    SendDrop,
    SendLoad,
    Tick,
)
from loraserve.controller.state import ControllerState, Settings
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec

POLICY = policy_named("rank_aware")
NODES = ("n1", "n2", "n3")
NAMES = ("a", "b", "c", "d")
MEMORY = 25
SETTINGS = Settings(placement_interval_ticks=7)

node_ids = st.sampled_from(NODES)
names = st.sampled_from(NAMES)


@dataclass
class FakeNode:
    incarnation: int
    alive: bool = True
    draining: bool = False
    generation: int = 0
    applied: int = 0
    copies: dict[tuple[AdapterId, str], Residency] = field(default_factory=dict)
    inbox: list[SendLoad | SendDrop] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.state = ControllerState(SETTINGS, POLICY, epoch=1)
        self.nodes: dict[str, FakeNode] = {}
        self.saved: dict[AdapterId, tuple[str, ...]] = {}
        self.version = self.command = self.revisions = self.incarnations = 0
        self.sent_lately = 0
        self.faults = False  # a node died or drained: copies may go without the controller's doing

    # The shell

    def tell(self, event: Event) -> None:
        for effect in self.state.step(event):
            self.carry_out(effect)

    def carry_out(self, effect: Effect) -> None:
        if isinstance(effect, PublishRoutes):
            assert effect.version == self.version + 1 == self.state.routes.version
            self.version = effect.version
        elif isinstance(effect, SavePlacement):
            self.saved = dict(effect.holders)
        elif isinstance(effect, SendLoad | SendDrop):
            self.sent_lately += 1
            assert effect.command_id > self.command
            self.command = effect.command_id
            if isinstance(effect, SendDrop):
                self.check_drop(effect)
            self.nodes[effect.node_id].inbox.append(effect)

    def check_drop(self, drop: SendDrop) -> None:
        route = self.state.routes.adapters.get(drop.adapter)
        if route is None:
            return  # removed from the cluster
        others = [
            h.node_id
            for r in route.revisions
            for h in r.holders
            if (h.node_id, r.revision) != (drop.node_id, drop.revision)
        ]
        assert others
        assert (drop.node_id, drop.revision) not in [
            (h.node_id, r.revision) for r in route.revisions for h in r.holders
        ]

    def serving(self, adapter: AdapterId) -> int:
        return sum(
            state.serves
            for node in self.nodes.values()
            for (held, revision), state in node.copies.items()
            if held == adapter and node.alive and self.state.revision(adapter, revision)
        )

    def run_command(self, node: FakeNode) -> None:
        command = node.inbox.pop(0)
        node.applied = command.command_id
        if isinstance(command, SendLoad):
            key = (command.spec.adapter, command.spec.revision)
            node.copies.setdefault(key, Residency.FETCHING)
            return
        before = self.serving(command.adapter)
        node.copies.pop((command.adapter, command.revision), None)
        if command.adapter in self.state.routes.adapters and not self.faults:
            assert before == 0 or self.serving(command.adapter) > 0, "the last copy was dropped"

    def beat(self, node_id: str) -> None:
        node = self.nodes[node_id]
        node.generation += 1
        copies = tuple(Copy(a, r, s) for (a, r), s in node.copies.items())
        failed, node.failed = tuple(node.failed), []
        self.tell(
            Heartbeat(
                node_id,
                node.incarnation,
                node.generation,
                copies,
                failed=failed,
                draining=node.draining,
                applied_command=node.applied,
            )
        )
        if node_id not in self.state.nodes:
            self.register(node_id, node)

    def register(self, node_id: str, node: FakeNode) -> None:
        record = NodeRecord(node_id, node.incarnation, f"{node_id}:1", "base", "", MEMORY)
        self.tell(NodeRegistered(record))

    def spec(self, name: str, size: int) -> AdapterSpec:
        self.revisions += 1
        return AdapterSpec(AdapterId("t", "base", name), f"r{self.revisions}", size, size)

    # What can happen

    @rule(node_id=node_ids)
    def start(self, node_id: str) -> None:
        known = self.nodes.get(node_id)
        if known is not None and known.alive and not known.draining:
            return
        self.incarnations += 1
        self.nodes[node_id] = FakeNode(self.incarnations)
        self.register(node_id, self.nodes[node_id])

    @rule(node_id=node_ids)
    def kill(self, node_id: str) -> None:
        if node_id in self.nodes:
            self.faults = True
            self.nodes[node_id].alive = False
            self.nodes[node_id].inbox.clear()

    @rule(node_id=node_ids)
    def drain(self, node_id: str) -> None:
        if node_id in self.nodes:
            self.faults = True
            self.nodes[node_id].draining = True

    @rule(name=names, size=st.integers(1, 30))
    def put(self, name: str, size: int) -> None:
        spec = self.spec(name, size)
        known = self.state.current(spec.adapter) is not None
        self.tell(AdapterUpdated(spec) if known else AdapterAdded(spec))

    @rule(name=names)
    def remove(self, name: str) -> None:
        adapter = AdapterId("t", "base", name)
        if self.state.current(adapter) is not None:
            self.tell(AdapterRemoved(adapter))

    @rule(node_id=node_ids, lose=st.booleans(), fail=st.booleans())
    def command_arrives(self, node_id: str, lose: bool, fail: bool) -> None:
        node = self.nodes.get(node_id)
        if node is None or not node.inbox or not node.alive:
            return
        if lose:  # with the stream that carried it
            node.inbox.clear()
            self.register(node_id, node)
        elif fail and isinstance(node.inbox[0], SendLoad):
            node.applied = node.inbox.pop(0).command_id
            node.failed.append((node.applied, "disk is full"))
        else:
            self.run_command(node)

    @rule(node_id=node_ids)
    def fetch_ends(self, node_id: str) -> None:
        node = self.nodes.get(node_id)
        if node is not None:
            for key, state in node.copies.items():
                if state is Residency.FETCHING:
                    node.copies[key] = Residency.HOST
                    break

    @rule(node_id=node_ids)
    def one_beats(self, node_id: str) -> None:
        if node_id in self.nodes and self.nodes[node_id].alive:
            self.beat(node_id)

    @rule()
    def all_beat_and_tick(self) -> None:
        for node_id, node in self.nodes.items():
            if node.alive:
                self.beat(node_id)
        self.tell(Tick())

    @rule()
    def controller_restarts(self) -> None:
        histories = list(self.state._histories.values())
        self.state = ControllerState(SETTINGS, POLICY, 2, histories, self.saved)
        self.version = self.command = 0
        for node in self.nodes.values():
            node.inbox.clear()
            node.applied = 0

    # What holds

    @invariant()
    def every_adapter_is_routed_or_explained(self) -> None:
        table = self.state.routes
        for adapter, route in table.adapters.items():
            assert bool(route.revisions) != bool(route.unrouted_reason)
            assert self.state.current(adapter) is not None
            for revision in route.revisions:
                assert revision.holders
                assert all(h.node_id in table.nodes for h in revision.holders)

    def teardown(self) -> None:
        """The faults stop."""
        for _ in range(60):
            self.sent_lately = 0
            for node_id, node in self.nodes.items():
                while node.alive and node.inbox:
                    self.run_command(node)
                for key in node.copies:
                    node.copies[key] = Residency.HOST
                if node.alive:
                    self.beat(node_id)
            self.tell(Tick())
        assert self.sent_lately == 0
        usable = {i for i, n in self.nodes.items() if n.alive and not n.draining}
        for adapter, route in self.state.routes.adapters.items():
            wanted = set(self.state._desired.get(adapter, ()))
            assert wanted <= usable
            if wanted:
                spec = self.state.current(adapter)
                assert spec is not None
                assert route.revision == spec.revision
                assert {h.node_id for h in route.revisions[0].holders} == wanted
        for node_id in usable:
            held = self.nodes[node_id].copies
            for adapter, revision in held:
                spec = self.state.current(adapter)
                assert spec is not None, "a copy of a removed adapter is left"
                wanted = set(self.state._desired.get(adapter, ()))
                if wanted:
                    assert (revision, node_id in wanted) == (spec.revision, True), "left over"


TestCluster = Cluster.TestCase
TestCluster.settings = hypothesis_settings(
    max_examples=60, stateful_step_count=50, deadline=None, print_blob=True
)


@pytest.mark.parametrize("seed", range(40))
def test_long_random_walks(seed: int) -> None:
    """Longer than hypothesis goes, with the mild events frequent and the faults rare."""
    random_ = random.Random(seed)
    cluster = Cluster()
    calm = seed % 4 == 0  # without losses of nodes, real copies are counted too
    for _ in range(400):
        node, name = random_.choice(NODES), random_.choice(NAMES)
        draw = random_.random()
        if draw < 0.35:
            lose, fail = random_.random() < 0.1, random_.random() < 0.1
            cluster.command_arrives(node, lose, fail)
        elif draw < 0.55:
            cluster.fetch_ends(node)
        elif draw < 0.7:
            cluster.one_beats(node)
        elif draw < 0.86:
            cluster.all_beat_and_tick()
        elif draw < 0.92:
            cluster.put(name, random_.randint(1, 12))
        elif draw < 0.93:
            cluster.remove(name)
        elif draw < 0.97:
            cluster.start(node)
        elif draw < 0.975:
            cluster.controller_restarts()
        elif draw < 0.985 and not calm:
            cluster.kill(node)
        elif draw < 0.988 and not calm:
            cluster.drain(node)
        cluster.every_adapter_is_routed_or_explained()
    cluster.teardown()
