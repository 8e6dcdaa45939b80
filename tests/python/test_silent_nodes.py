"""Nodes that say nothing any more: when routes leave them out, and when they are lost. In ticks,
which is what the promises are made of; how long things take is for the integration tests to print.
"""

from loraserve.controller.events import (
    AdapterAdded,
    Copy,
    Heartbeat,
    LinkLost,
    NodeLost,
    NodeRecord,
    NodeRegistered,
    Residency,
    Tick,
)
from loraserve.controller.settings import Settings
from loraserve.controller.state import ControllerState
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec

SQL = AdapterId("t", "base", "sql")


class Cluster:
    """A controller as daemons have it, and nodes that all hold SQL and beat when a test says so."""

    def __init__(self, *node_ids: str) -> None:
        settings = Settings(replicas=len(node_ids))
        self.state = ControllerState(settings, policy_named("rank_aware"), 1)
        self.state.step(AdapterAdded(AdapterSpec(SQL, "r1", 10, 8)))
        for node_id in node_ids:
            record = NodeRecord(node_id, 1, f"{node_id}:7410", "base", "", 1000)
            self.state.step(NodeRegistered(record))
            self.beat(node_id)

    def beat(self, *node_ids: str) -> None:
        copy = Copy(SQL, "r1", Residency.HOST, "", 10)
        for node_id in node_ids:
            self.state.step(Heartbeat(node_id, 1, 1, (copy,)))

    def tick(self, *beating: str) -> list[str]:
        """The nodes that are lost with it."""
        effects = self.state.step(Tick())
        self.beat(*beating)
        return [effect.node_id for effect in effects if isinstance(effect, NodeLost)]

    @property
    def routed(self) -> list[str]:
        route = self.state.routes.adapters[SQL]
        return [holder.node_id for r in route.revisions for holder in r.holders]


def test_a_silent_node_is_left_out_after_two_ticks_and_lost_after_four() -> None:
    cluster = Cluster("n1", "n2")
    seen = [(cluster.tick("n1"), cluster.routed) for _ in range(4)]
    both, one = ["n1", "n2"], ["n1"]
    assert seen == [([], both), ([], one), ([], one), (["n2"], one)]
    assert list(cluster.state.nodes) == ["n1"]


def test_a_node_that_speaks_again_before_it_is_lost_is_routed_to_again() -> None:
    cluster = Cluster("n1", "n2")
    for _ in range(3):
        cluster.tick("n1")
    assert cluster.routed == ["n1"]
    cluster.beat("n2")
    assert cluster.routed == ["n1", "n2"]
    assert [cluster.tick("n1", "n2") for _ in range(5)] == [[]] * 5


def test_a_node_whose_stream_ends_is_left_out_at_once_and_lost_two_ticks_later() -> None:
    cluster = Cluster("n1", "n2")
    cluster.state.step(LinkLost("n2", 1))
    assert cluster.routed == ["n1"]
    assert [cluster.tick("n1") for _ in range(2)] == [[], ["n2"]]


def test_the_only_copy_stays_in_routes_until_its_node_is_lost() -> None:
    cluster = Cluster("n1")
    for _ in range(3):
        assert (cluster.tick(), cluster.routed) == ([], ["n1"])
    assert (cluster.tick(), cluster.routed) == (["n1"], [])


def test_where_most_fall_silent_together_routes_stay_until_they_are_lost() -> None:
    names = [f"n{i}" for i in range(9)]
    for speaking, left_out in ((5, 4), (4, 0)):
        cluster = Cluster(*names)
        for _ in range(3):
            assert cluster.tick(*names[:speaking]) == []
        assert cluster.routed == names[: 9 - left_out]
        assert cluster.tick(*names[:speaking]) == names[speaking:]
        assert cluster.routed == names[:speaking]
