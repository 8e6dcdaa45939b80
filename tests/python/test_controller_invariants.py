"""The controller's core against simulated nodes that lose commands and streams, die, drain, run out
of memory, fail to load and talk rubbish.

Whatever happens: the last copy that serves is never dropped, versions and command ids rise, every
adapter has a route or a reason, nodes hold no more than they can, and what moves for balance stays
within the budget of its interval. When the faults stop, the core is quiet after CONVERGED_TICKS,
and where there is room everything placed is served and nothing is left over.
"""

import math
import random
from dataclasses import replace

import pytest
from fuzz_budget import examples
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from walked_cluster import POLICY, SETTINGS, FakeNode, Shell

from loraserve.controller.events import (
    AdapterAdded,
    AdapterRemoved,
    AdapterUpdated,
    DemandSample,
    Heartbeat,
    LinkLost,
    PlacementComputed,
    PlacementFailed,
    Residency,
    SendLoad,
    Tick,
)
from loraserve.controller.placing import solve
from loraserve.controller.state import ControllerState
from loraserve.placement.types import AdapterId

NODES = ("n1", "n2", "n3")
NAMES = ("a", "b", "c", "d")
# A drop's delay, loads of a budget's worth in each interval, and the failures' back-off.
CONVERGED_TICKS = 90

node_ids = st.sampled_from(NODES)
names = st.sampled_from(NAMES)


class Cluster(Shell):
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
    def placement_breaks(self) -> None:
        if self.asked:
            self.tell(PlacementFailed(self.asked.pop(0), "broken"))

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
        elif draw < 0.865:
            cluster.placement_breaks()
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
