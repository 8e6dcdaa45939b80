"""The controller's core and simulated nodes, for random walks: what an event and an effect do, and
what must hold of each. The walks say what happens."""

from dataclasses import dataclass, field

from hypothesis.stateful import RuleBasedStateMachine

from loraserve.controller.events import (
    AskResidency,
    ComputePlacement,
    Copy,
    DemandSample,
    Effect,
    Event,
    Heartbeat,
    NodeLost,
    NodeRecord,
    NodeRegistered,
    PublishRoutes,
    Residency,
    SavePlacement,
    SendDrop,
    SendLoad,
    Tick,
)
from loraserve.controller.placing import PlacementQuestion
from loraserve.controller.state import ControllerState, Settings
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec

POLICY = policy_named("rank_aware")
MOVE_BYTES = 20
SETTINGS = Settings(
    placement_interval_ticks=7,
    move_bytes=MOVE_BYTES,
    burst_check_ticks=2,
    burst_gap_ticks=3,
    answer_ticks=4,
)

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


class Shell(RuleBasedStateMachine):
    """Feeds the core events, carries its effects out and checks each of them."""

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
        self.check_peers(load)
        if place not in self.underway and self.state.routes.adapters[spec.adapter].revisions:
            self.moved += spec.size_bytes
            self.largest = max(self.largest, spec.size_bytes)
            assert self.moved <= max(MOVE_BYTES, self.largest)
        self.underway[place] = load.command_id

    def check_peers(self, load: SendLoad) -> None:
        """Nodes that hold the copy and will keep it, as far as they have said."""
        key = (load.spec.adapter, load.spec.revision)
        assert len({p.node_id for p in load.peers}) == len(load.peers) <= 3
        for peer in load.peers:
            node = self.state.nodes[peer.node_id]
            assert peer.node_id != load.node_id
            assert peer.address == node.record.address
            assert node.heard
            assert node.copies[key].state.serves
            assert key not in node.drops

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
