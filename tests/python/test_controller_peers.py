"""Whom a node is told to read a copy from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from controller_fixtures import PACKED, TICK_S, FakeNode, Site, play

from loraserve.controller.events import (
    AdapterAdded,
    Copy,
    Effect,
    Heartbeat,
    NodeRecord,
    NodeRegistered,
    Residency,
    SendLoad,
    Tick,
)
from loraserve.controller.membership import Membership, Node, SentDrop
from loraserve.controller.peers import MAX_HOLDERS, READ_MEMORY_TICKS, PeerChoice
from loraserve.controller.settings import Settings
from loraserve.controller.state import ControllerState
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.v1 import common_pb2, controller_pb2

SQL = AdapterId("t", "base", "sql")
KEY = (SQL, "r1")


class Nodes:
    """Registered nodes that say what they hold."""

    def __init__(self) -> None:
        self.members = Membership()
        self.choice = PeerChoice(self.members)
        self.generation = 0

    def add(
        self, node_id: str, state: Residency | None = Residency.HOST, domain: str = "", **beat: Any
    ) -> Node:
        record = NodeRecord(node_id, 1, f"{node_id}:7410", "base", "", 1000, domain=domain)
        self.members.register(record, 0)
        self.generation += 1
        copies = {} if state is None else {KEY: Copy(SQL, "r1", state)}
        self.members.hear(replace(Heartbeat(node_id, 1, self.generation), **beat), copies, 0)
        return self.members.nodes[node_id]

    def names(self, reader: Node | None = None) -> list[str]:
        return [holder.node_id for holder in self.choice.holders(KEY, reader)]


def test_only_copies_that_are_whole_and_stay_are_named() -> None:
    nodes = Nodes()
    for state in Residency:
        nodes.add(state.name, state)
    nodes.add("NOTHING", None)
    assert sorted(nodes.names()) == ["DEVICE", "HOST"]
    assert nodes.names(nodes.members.nodes["HOST"]) == ["DEVICE"]  # not the reader itself
    nodes.members.nodes["DEVICE"].drops[KEY] = SentDrop(1, 0)
    assert nodes.names() == ["HOST"]
    nodes.members.unlink("HOST", 1, 0)
    assert nodes.names() == []


def test_another_revision_is_another_copy() -> None:
    nodes = Nodes()
    nodes.add("n1")
    assert nodes.choice.holders((SQL, "r2")) == ()


def test_the_address_is_the_one_that_the_node_registered_last() -> None:
    nodes = Nodes()
    nodes.add("n1")
    assert [holder.address for holder in nodes.choice.holders(KEY)] == ["n1:7410"]


def test_near_ones_first_then_idle_ones_and_those_that_drain_last() -> None:
    nodes = Nodes()
    reader = nodes.add("reader", None, "a")
    nodes.add("busy", domain="b", waiting_tokens=500)
    nodes.add("idle", domain="b")
    nodes.add("drains", domain="a", draining=True)
    nodes.add("near", domain="a", waiting_tokens=9000)
    assert nodes.names(reader) == ["near", "idle", "busy"][:MAX_HOLDERS]
    nodes.members.unlink("idle", 1, 0)
    assert nodes.names(reader) == ["near", "busy", "drains"]


def test_a_near_one_that_is_busy_is_passed_over() -> None:
    nodes = Nodes()
    reader = nodes.add("reader", None, "a")
    nodes.add("near", domain="a", waiting_tokens=1)
    nodes.add("far", domain="b")
    assert nodes.names(reader) == ["near", "far"]
    nodes.choice.begin("other", KEY, "near", 0)
    assert nodes.names(reader) == ["far", "near"]


def test_holders_share_the_reads() -> None:
    """However many nodes read at once, no holder gets two more than another."""
    nodes = Nodes()
    for i in range(4):
        nodes.add(f"holder{i}")
    for i in range(40):
        reader = nodes.add(f"reader{i}", None)
        nodes.choice.begin(f"reader{i}", KEY, nodes.names(reader)[0], 0)
        reads = [nodes.choice.outgoing(f"holder{h}") for h in range(4)]
        assert sum(reads) == i + 1
        assert max(reads) - min(reads) <= 1


def test_without_a_word_of_the_reader_chance_spreads_them() -> None:
    nodes = Nodes()
    for i in range(4):
        nodes.add(f"holder{i}")
    firsts = {nodes.choice.holders(KEY, nodes.add(f"reader{i}", None))[0] for i in range(40)}
    assert len(firsts) == 4


def test_a_read_ends_when_the_reader_has_the_copy_fails_or_is_not_heard_of() -> None:
    nodes = Nodes()
    for state, counted in (
        (Residency.PENDING, 1),
        (Residency.FETCHING, 1),
        (Residency.HOST, 0),
        (Residency.FAILED, 0),
        (None, 0),
    ):
        nodes.choice.begin("reader", KEY, "holder", 0)
        copy = None if state is None else Copy(SQL, "r1", state)
        nodes.choice.reported("reader", KEY, copy)
        assert nodes.choice.outgoing("holder") == counted, state
    nodes.choice.begin("reader", KEY, "holder", 5)
    nodes.choice.begin("reader", KEY, "another", 7)  # told again
    assert (nodes.choice.outgoing("holder"), nodes.choice.outgoing("another")) == (0, 1)
    nodes.choice.forget_before(7)
    assert nodes.choice.outgoing("another") == 1
    nodes.choice.forget_before(8)
    assert nodes.choice.outgoing("another") == 0
    assert READ_MEMORY_TICKS > 8


def test_a_copy_is_on_its_way_before_routes_name_its_node() -> None:
    """The controller's word that an adapter will be wanted comes with whom to read it from, and
    requests come when it has been read."""
    state = ControllerState(Settings(replicas=2), policy_named("rank_aware"), 1)
    spec = AdapterSpec(SQL, "r1", 10, 8)
    node_ids = ("n1", "n2")

    def beat(node_id: str, generation: int, residency: Residency) -> list[Effect]:
        return state.step(Heartbeat(node_id, 1, generation, (Copy(SQL, "r1", residency, "", 10),)))

    def routed() -> list[str]:
        route = state.routes.adapters[SQL]
        return [holder.node_id for r in route.revisions for holder in r.holders]

    state.step(NodeRegistered(NodeRecord("n1", 1, "n1:7410", "base", "", 1000)))
    state.step(Heartbeat("n1", 1, 1))
    state.step(AdapterAdded(spec))
    beat("n1", 2, Residency.HOST)
    assert routed() == ["n1"]
    state.step(NodeRegistered(NodeRecord("n2", 1, "n2:7410", "base", "", 1000)))
    effects = state.step(Heartbeat("n2", 1, 1)) + state.step(Tick())
    (load,) = [effect for effect in effects if isinstance(effect, SendLoad)]
    assert (load.node_id, [peer.node_id for peer in load.peers]) == ("n2", ["n1"])
    assert routed() == ["n1"]
    for generation, residency in ((2, Residency.PENDING), (3, Residency.FETCHING)):
        beat("n2", generation, residency)
        assert routed() == ["n1"]
    beat("n2", 4, Residency.HOST)
    assert routed() == list(node_ids)


def test_load_commands_and_answers_about_names_carry_the_holders(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        async with FakeNode(site, "n1") as first:
            await site.create("sql", PACKED)
            await site.served("sql", ["n1"])
            assert not first.commands[0].load.peers
            async with FakeNode(site, "node2") as second:
                await site.served("sql", ["n1", "node2"])
                (command,) = second.commands
                assert [(p.node_id, p.address) for p in command.load.peers] == [
                    ("n1", "127.0.0.1:9002")
                ]
                request = controller_pb2.ResolveAdapterRequest(
                    adapter=common_pb2.AdapterId(tenant="acme", base="base", name="sql")
                )
                found = await site.controller.ResolveAdapter(request, metadata=site.auth("node"))
                named = {(p.node_id, p.address) for p in found.load.peers}
                assert named == {("n1", "127.0.0.1:9002"), ("node2", "127.0.0.1:9005")}

    play(tmp_path, script, settings=Settings(tick_seconds=TICK_S, silent_ticks=500, replicas=2))
