"""The controller's core against simulated nodes that lose commands and streams, die, drain, run out
of memory, fail to load and talk rubbish.

Whatever happens: the last copy that serves is never dropped, versions and command ids rise, every
adapter has a route or a reason, nodes hold no more than they can, and what moves for balance stays
within the budget of its interval. When the faults stop, the core is quiet after CONVERGED_TICKS,
and where there is room everything placed is served and nothing is left over.
"""

import math
import random
from dataclasses import dataclass, field, replace

import pytest
from fuzz_budget import examples
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loraserve.controller.events import (
    AdapterAdded,
    AdapterRemoved,
    AdapterUpdated,
    AskResidency,
    ComputePlacement,
    Copy,
    DemandSample,
    Effect,
    Event,
    Heartbeat,
    LinkLost,
    NodeLost,
    NodeRecord,
    NodeRegistered,
    PlacementComputed,
    PublishRoutes,
    Residency,
    SavePlacement,
    SendDrop,
    SendLoad,
    Tick,
)
from loraserve.controller.placing import PlacementQuestion, solve
from loraserve.controller.state import ControllerState, Settings
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec

POLICY = policy_named("rank_aware")
NODES = ("n1", "n2", "n3")
NAMES = ("a", "b", "c", "d")
MOVE_BYTES = 20
SETTINGS = Settings(
    placement_interval_ticks=7, move_bytes=MOVE_BYTES, burst_check_ticks=2, burst_gap_ticks=3
)
# A drop's delay, loads of a budget's worth in each interval, and the failures' back-off.
CONVERGED_TICKS = 90

node_ids = st.sampled_from(NODES)
names = st.sampled_from(NAMES)
Key = tuple[AdapterId, str]


@dataclass
class FakeNode:
    """`told`: the generation and copies of the last heartbeat that was sent."""

    incarnation: int
    memory: int
    alive: bool = True
    draining: bool = False
    generation: int = 1
    applied: int = 0
    copies: dict[Key, Residency] = field(default_factory=dict)
    sizes: dict[Key, int] = field(default_factory=dict)
    users: set[Key] = field(default_factory=set)
    inbox: list[SendLoad | SendDrop] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)
    told: tuple[int, dict[Key, Residency]] | None = None

    def has_room(self, spec: AdapterSpec) -> bool:
        """Another revision of the same adapter may stand beside it for a while."""
        others = [k for k, s in self.copies.items() if k[0] != spec.adapter]
        return sum(self.sizes[k] for k in others) + spec.size_bytes <= self.memory


class Cluster(RuleBasedStateMachine):
    MEMORY = 200
    # Whether placements are computed elsewhere, and anything may happen until the answer comes.
    DEFERS = False

    def __init__(self) -> None:
        super().__init__()
        self.state = ControllerState(SETTINGS, POLICY, epoch=1, defers_placement=self.DEFERS)
        self.asked: list[PlacementQuestion] = []
        self.nodes: dict[str, FakeNode] = {}
        self.saved: dict[AdapterId, tuple[str, ...]] = {}
        self.version = self.command = self.revisions = self.incarnations = 0
        self.ticks = 0
        self.sent_lately = 0
        self.moved = 0  # bytes in this interval for adapters that were served
        self.largest = 0  # of the copies that were so moved
        self.underway: dict[tuple[str, Key], int] = {}
        self.faults = False  # a node died or drained: copies may go without the controller's doing

    # The shell

    def tell(self, event: Event) -> None:
        if isinstance(event, Tick):
            self.ticks += 1
            if self.ticks % SETTINGS.placement_interval_ticks == 0:
                self.moved = self.largest = 0
        for effect in self.state.step(event):
            self.carry_out(effect)

    def carry_out(self, effect: Effect) -> None:
        if isinstance(effect, PublishRoutes):
            assert effect.version == self.version + 1
            assert effect.delta
            self.version = effect.version
        elif isinstance(effect, SavePlacement):
            self.saved.update(effect.holders)
            for adapter in effect.removed:
                self.saved.pop(adapter, None)
        elif isinstance(effect, ComputePlacement):
            self.asked.append(effect.question)
        elif isinstance(effect, AskResidency):
            self.nodes[effect.node_id].told = None
        elif isinstance(effect, NodeLost):
            self.forget_underway(effect.node_id)
        elif isinstance(effect, SendLoad | SendDrop):
            self.sent_lately += 1
            assert effect.command_id > self.command
            self.command = effect.command_id
            if isinstance(effect, SendDrop):
                self.check_drop(effect)
            else:
                self.check_load(effect)
            self.nodes[effect.node_id].inbox.append(effect)

    def check_load(self, load: SendLoad) -> None:
        spec = load.spec
        assert self.state.current(spec.adapter) == spec
        place = (load.node_id, (spec.adapter, spec.revision))
        if place not in self.underway and self.state.routes.adapters[spec.adapter].revisions:
            self.moved += spec.size_bytes
            self.largest = max(self.largest, spec.size_bytes)
            assert self.moved <= max(MOVE_BYTES, self.largest)
        self.underway[place] = load.command_id

    def check_drop(self, drop: SendDrop) -> None:
        route = self.state.routes.adapters.get(drop.adapter)
        if route is None:
            return  # removed from the cluster
        if self.state.revision(drop.adapter, drop.revision) is None:
            return  # of a name that was removed and created anew
        routed = {(h.node_id, r.revision) for r in route.revisions for h in r.holders}
        assert routed
        assert (drop.node_id, drop.revision) not in routed

    def forget_underway(self, node_id: str) -> None:
        self.underway = {p: c for p, c in self.underway.items() if p[0] != node_id}

    def serving(self, adapter: AdapterId) -> int:
        return sum(
            state.serves
            for node in self.nodes.values()
            for (held, revision), state in node.copies.items()
            if held == adapter and node.alive and self.state.revision(adapter, revision)
        )

    def change(self, node: FakeNode, key: Key, state: Residency | None) -> None:
        node.generation += 1
        if state is None:
            node.copies.pop(key, None)
        else:
            node.copies[key] = state

    def run_command(self, node: FakeNode) -> None:
        command = node.inbox.pop(0)
        node.applied = command.command_id
        if isinstance(command, SendLoad):
            key = (command.spec.adapter, command.spec.revision)
            held = node.copies.get(key)
            if held is not None and held.present:
                return
            if held is None and not node.has_room(command.spec):
                node.failed.append((command.command_id, "no room"))
                return
            node.sizes[key] = command.spec.size_bytes
            self.change(node, key, Residency.HOST if held else Residency.FETCHING)
            return
        key = (command.adapter, command.revision)
        if key in node.users and key in node.copies:
            self.change(node, key, Residency.DRAINING)
            return
        before = self.serving(command.adapter)
        if key in node.copies:
            self.change(node, key, None)
        if command.adapter in self.state.routes.adapters and not self.faults:
            assert before == 0 or self.serving(command.adapter) > 0, "the last copy was dropped"

    def beat(self, node_id: str, demand: tuple[DemandSample, ...] = ()) -> None:
        """All of what it holds, or what changed where something was told before."""
        node = self.nodes[node_id]
        failed, node.failed = tuple(node.failed), []
        copies, since, removed = node.copies, 0, []
        if node.told is not None:
            since, before = node.told
            copies = {k: s for k, s in node.copies.items() if before.get(k) != s}
            removed = [k for k in before if k not in node.copies]
        shown = [key for key, state in node.copies.items() if state.present]
        for command_id, _ in failed:
            self.underway = {p: c for p, c in self.underway.items() if c != command_id}
        node.told = (node.generation, dict(node.copies))
        self.tell(
            Heartbeat(
                node_id,
                node.incarnation,
                node.generation,
                tuple(Copy(a, r, s) for (a, r), s in copies.items()),
                demand,
                failed,
                node.draining,
                node.applied,
                since,
                tuple(removed),
            )
        )
        if node.told is not None:  # else the controller could make nothing of it, and asks again
            for key in shown:
                self.underway.pop((node_id, key), None)
        if node_id not in self.state.nodes:
            self.register(node_id, node)

    def register(self, node_id: str, node: FakeNode) -> None:
        self.forget_underway(node_id)
        node.told = None
        record = NodeRecord(node_id, node.incarnation, f"{node_id}:1", "base", "", node.memory)
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
        self.nodes[node_id] = FakeNode(self.incarnations, self.MEMORY)
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
            self.tell(LinkLost(node_id, node.incarnation))
            self.forget_underway(node_id)
            self.register(node_id, node)
        elif fail and isinstance(node.inbox[0], SendLoad):
            node.applied = node.inbox.pop(0).command_id
            node.failed.append((node.applied, "disk is full"))
        else:
            self.run_command(node)

    @rule(node_id=node_ids)
    def stream_ends(self, node_id: str) -> None:
        node = self.nodes.get(node_id)
        if node is not None and node_id in self.state.nodes:
            node.inbox.clear()
            self.forget_underway(node_id)
            self.tell(LinkLost(node_id, node.incarnation))
            if node.alive:
                self.register(node_id, node)

    @rule(node_id=node_ids)
    def heartbeat_is_lost(self, node_id: str) -> None:
        """As if it had been sent: the next one does not follow."""
        node = self.nodes.get(node_id)
        if node is not None and node.told is not None and node.generation != node.told[0]:
            node.told = (node.generation, dict(node.copies))

    @rule(node_id=node_ids)
    def fetch_ends(self, node_id: str) -> None:
        node = self.nodes.get(node_id)
        if node is not None:
            for key, state in node.copies.items():
                if state is Residency.FETCHING:
                    self.change(node, key, Residency.HOST)
                    break

    @rule(node_id=node_ids)
    def requests_begin(self, node_id: str) -> None:
        node = self.nodes.get(node_id)
        if node is not None:
            node.users |= {key for key, state in node.copies.items() if state.serves}

    @rule(node_id=node_ids)
    def requests_end(self, node_id: str) -> None:
        node = self.nodes.get(node_id)
        if node is not None:
            self.end_requests(node)

    def end_requests(self, node: FakeNode) -> None:
        for key in [k for k, s in node.copies.items() if s is Residency.DRAINING]:
            self.change(node, key, None)
        node.users.clear()

    @rule(node_id=node_ids)
    def one_beats(self, node_id: str) -> None:
        if node_id in self.nodes and self.nodes[node_id].alive:
            self.beat(node_id)

    @rule(node_id=node_ids, name=names, tokens=st.sampled_from([10, 3000, 40000]))
    def demand_comes(self, node_id: str, name: str, tokens: int) -> None:
        if node_id in self.nodes and self.nodes[node_id].alive:
            self.beat(node_id, (DemandSample(AdapterId("t", "base", name), tokens, tokens),))

    @rule(node_id=node_ids, kind=st.integers(0, 5))
    def rubbish_comes(self, node_id: str, kind: int) -> None:
        """What cannot be true changes nothing but the count."""
        known = self.state.nodes.get(node_id)
        if known is None or not known.reported:
            return
        stranger = AdapterId("t", "base", "stranger")
        made = Heartbeat(
            node_id, known.record.incarnation, known.generation, draining=known.draining,
            since_generation=known.generation,
        )  # fmt: skip
        rubbish = [
            replace(made, demand=(DemandSample(stranger, 5, 5),)),
            replace(made, demand=(DemandSample(AdapterId("t", "base", "a"), math.nan, 1),)),
            replace(made, demand=(DemandSample(AdapterId("t", "base", "a"), -5, 1e300),)),
            replace(made, applied_command=1 << 60),
            replace(made, epoch=99),
            replace(made, incarnation=known.record.incarnation + 1),
        ][kind]
        counted = sum(self.state.ignored.values())
        before = self.state.routes
        self.tell(rubbish)
        assert sum(self.state.ignored.values()) == counted + 1
        if known.unlinked_tick is None:
            assert self.state.routes.nodes == before.nodes

    @rule()
    def all_beat_and_tick(self) -> None:
        for node_id, node in self.nodes.items():
            if node.alive:
                self.beat(node_id)
        self.tell(Tick())

    @rule(again=st.booleans())
    def placement_is_computed(self, again: bool) -> None:
        """Perhaps for a controller that is not there any more."""
        if self.asked:
            answer = PlacementComputed(solve(self.asked.pop(0)))
            self.tell(answer)
            if again:
                targets = dict(self.state._targets.all)
                self.tell(answer)
                assert targets == self.state._targets.all

    @rule()
    def controller_restarts(self) -> None:
        histories = [self.state.history(a) for a in self.state.routes.adapters]
        self.state = ControllerState(
            SETTINGS, POLICY, 2, histories, self.saved, defers_placement=self.DEFERS
        )
        self.version = self.command = self.ticks = self.moved = self.largest = 0
        self.underway = {}
        for node in self.nodes.values():
            node.inbox.clear()
            node.applied = 0
            node.told = None

    # What holds

    @invariant()
    def every_adapter_is_routed_or_explained(self) -> None:
        table = self.state.routes
        if table.version:
            assert {*table.adapters} == {*self.state._catalog}
        for adapter, route in table.adapters.items():
            assert bool(route.revisions) != bool(route.unrouted_reason)
            assert self.state.current(adapter) is not None
            for revision in route.revisions:
                assert revision.holders
                assert all(h.weight > 0 for h in revision.holders)
                assert all(h.node_id in table.nodes for h in revision.holders)
        unrouted = sum(not route.revisions for route in table.adapters.values())
        assert self.state.unrouted == unrouted

    @invariant()
    def the_published_routes_are_those_that_follow_from_all(self) -> None:
        """What is kept up to date by changes is what a look at everything would give."""
        if self.state.routes.version:
            for adapter, route in self.state.routes.adapters.items():
                assert self.state._choice.route(adapter) == route

    @invariant()
    def memory_is_counted_right(self) -> None:
        for node in self.state.nodes.values():
            taken = [c.size_bytes for c in node.copies.values() if c.state is not Residency.FAILED]
            assert node.used_bytes == sum(taken)

    # The end

    def settle_down(self) -> None:
        """The faults stop, and time passes."""
        for _ in range(CONVERGED_TICKS):
            self.sent_lately = 0
            for node_id, node in self.nodes.items():
                self.end_requests(node)
                while node.alive and node.inbox:
                    self.run_command(node)
                for key, state in list(node.copies.items()):
                    if state is not Residency.HOST:
                        self.change(node, key, Residency.HOST)
                if node.alive:
                    self.beat(node_id)
            self.tell(Tick())
            while self.asked:
                self.placement_is_computed(False)
            self.every_adapter_is_routed_or_explained()
        self.nothing_is_promised_twice()

    def nothing_is_promised_twice(self) -> None:
        promised = dict.fromkeys(self.nodes, 0)
        for adapter, wanted in self.state._targets.all.items():
            spec = self.state.current(adapter)
            assert spec is not None
            for node_id in wanted.nodes:
                promised[node_id] += spec.size_bytes
        assert all(promised[n] <= node.memory for n, node in self.nodes.items())

    def teardown(self) -> None:
        self.settle_down()
        assert self.sent_lately == 0
        usable = {i for i, n in self.nodes.items() if n.alive and not n.draining}
        for adapter, route in self.state.routes.adapters.items():
            wanted = set(self.state.target(adapter).nodes)
            assert wanted <= usable
            assert bool(wanted) == bool(usable)
            if wanted:
                spec = self.state.current(adapter)
                assert spec is not None
                assert route.revision == spec.revision
                assert {h.node_id for h in route.revisions[0].holders} == wanted
        for node_id in usable:
            for adapter, revision in self.nodes[node_id].copies:
                spec = self.state.current(adapter)
                assert spec is not None, "a copy of a removed adapter is left"
                wanted = set(self.state.target(adapter).nodes)
                if wanted:
                    assert (revision, node_id in wanted) == (spec.revision, True), "left over"


class Cramped(Cluster):
    """Too little memory for everything: some adapters have no place, and nodes refuse loads."""

    MEMORY = 25

    def teardown(self) -> None:
        self.settle_down()
        for node in self.nodes.values():
            mine: dict[AdapterId, int] = {}
            for key in node.copies:
                mine[key[0]] = max(mine.get(key[0], 0), node.sizes[key])
            # Two revisions of one adapter may stand side by side, nothing else over the limit.
            assert sum(mine.values()) <= node.memory + max(node.sizes.values(), default=0)
        for adapter, route in self.state.routes.adapters.items():
            if self.serving_on_usable(adapter):
                assert route.revisions, route.unrouted_reason

    def serving_on_usable(self, adapter: AdapterId) -> bool:
        return any(
            state.serves and self.state.revision(*key) and node.alive and not node.draining
            for node in self.nodes.values()
            for key, state in node.copies.items()
            if key[0] == adapter
        )


class Deferring(Cluster):
    DEFERS = True


class DeferringCramped(Cramped):
    DEFERS = True


TestCluster = Cluster.TestCase
TestCramped = Cramped.TestCase
TestDeferring = Deferring.TestCase
TestDeferringCramped = DeferringCramped.TestCase
TestCluster.settings = hypothesis_settings(
    max_examples=examples(50), stateful_step_count=50, deadline=None, print_blob=True
)
TestCramped.settings = hypothesis_settings(TestCluster.settings, max_examples=examples(40))
TestDeferring.settings = TestCluster.settings
TestDeferringCramped.settings = TestCramped.settings


@pytest.mark.parametrize("seed", range(36))
def test_long_random_walks(seed: int) -> None:
    """Longer than hypothesis goes, with the mild events frequent and the faults rare."""
    random_ = random.Random(seed)
    roomy, cramped = (Deferring, DeferringCramped) if seed % 2 else (Cluster, Cramped)
    cluster = roomy() if seed % 3 else cramped()
    calm = seed % 4 == 0  # without losses of nodes, real copies are counted too
    for _ in range(400):
        node, name = random_.choice(NODES), random_.choice(NAMES)
        draw = random_.random()
        if draw < 0.33:
            lose, fail = random_.random() < 0.1, random_.random() < 0.1
            cluster.command_arrives(node, lose, fail)
        elif draw < 0.5:
            cluster.fetch_ends(node)
        elif draw < 0.6:
            cluster.one_beats(node)
        elif draw < 0.63:
            cluster.demand_comes(node, name, random_.choice([10, 3000, 40000]))
        elif draw < 0.65:
            cluster.rubbish_comes(node, random_.randrange(6))
        elif draw < 0.68:
            (cluster.requests_begin if random_.random() < 0.3 else cluster.requests_end)(node)
        elif draw < 0.7:
            cluster.heartbeat_is_lost(node)
        elif draw < 0.71:
            cluster.stream_ends(node)
        elif draw < 0.84:
            cluster.all_beat_and_tick()
        elif draw < 0.86:
            cluster.placement_is_computed(again=random_.random() < 0.2)
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
        cluster.memory_is_counted_right()
    cluster.teardown()
