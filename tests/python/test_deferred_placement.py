"""Whole placements that are computed elsewhere: what happens between question and answer."""

import pytest

from loraserve.controller import planner
from loraserve.controller.asked import MOST_PATIENCE
from loraserve.controller.events import (
    AdapterAdded,
    AdapterRemoved,
    AdapterUpdated,
    ComputePlacement,
    Effect,
    Event,
    Heartbeat,
    NodeRecord,
    NodeRegistered,
    PlacementComputed,
    PlacementFailed,
    SavePlacement,
    TellOperator,
    Tick,
)
from loraserve.controller.placing import PlacementAnswer, PlacementQuestion, solve
from loraserve.controller.state import ControllerState, Settings
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec

MEMORY = 10
SETTINGS = Settings(placement_interval_ticks=1000, silent_ticks=1, unlinked_ticks=1)


def spec(name: str, revision: str = "r1", size: int = 6) -> AdapterSpec:
    return AdapterSpec(AdapterId("t", "base", name), revision, size, 8)


X, Y, Z = spec("x"), spec("y"), spec("z")


class Cluster:
    """Nodes n1 and n2, each with room for one of the adapters x and y, and a question about them
    that waits for its answer."""

    def __init__(self, memory: int = MEMORY) -> None:
        self.memory = memory
        self.state = ControllerState(
            SETTINGS, policy_named("rank_aware"), 1, [(X,), (Y,)], defers_placement=True
        )
        self.questions: list[PlacementQuestion] = []
        for node_id in ("n1", "n2"):
            self.register(node_id, memory)
        # The first is asked at once, when only one node is there.
        self.step(PlacementComputed(PlacementAnswer(self.questions.pop(), "asked too early")))
        self.tick("n1", "n2")
        assert len(self.questions) == 1

    def register(self, node_id: str, memory: int, incarnation: int = 1) -> None:
        record = NodeRecord(node_id, incarnation, f"{node_id}:1", "base", "", memory)
        self.step(NodeRegistered(record))
        self.step(Heartbeat(node_id, incarnation, 1))

    def step(self, event: Event) -> list[Effect]:
        effects = self.state.step(event)
        self.questions += [e.question for e in effects if isinstance(e, ComputePlacement)]
        return effects

    def tick(self, *alive: str) -> None:
        for node_id in alive:
            self.step(Heartbeat(node_id, 1, 1, since_generation=1))
        self.step(Tick())

    def answer(self) -> list[Effect]:
        return self.step(PlacementComputed(solve(self.questions.pop(0))))

    def homes(self) -> dict[str, tuple[str, ...]]:
        return {s.adapter.name: self.state.target(s.adapter).nodes for s in (X, Y, Z)}

    def promised(self, node_id: str) -> int:
        known = [s for s in map(self.state.current, (a.adapter for a in (X, Y, Z))) if s]
        return sum(s.size_bytes for s in known if node_id in self.state.target(s.adapter).nodes)


def test_nothing_is_placed_until_the_answer_comes() -> None:
    cluster = Cluster()
    assert cluster.homes() == {"x": (), "y": (), "z": ()}
    effects = cluster.answer()
    saved = next(e for e in effects if isinstance(e, SavePlacement))
    assert sorted(saved.holders.values()) == [("n1",), ("n2",)]


def test_one_question_at_a_time() -> None:
    """What happened meanwhile is asked about when the answer has come."""
    cluster = Cluster()
    cluster.register("n2", 3 * MEMORY, incarnation=2)
    for _ in range(4):
        cluster.step(Heartbeat("n2", 2, 1, since_generation=1))
        cluster.tick("n1")
    assert len(cluster.questions) == 1
    cluster.answer()
    cluster.step(Heartbeat("n2", 2, 1, since_generation=1))
    cluster.tick("n1")
    assert len(cluster.questions) == 1
    assert cluster.questions[0].nodes[1].adapter_memory_bytes == 3 * MEMORY


def test_a_node_that_went_meanwhile_gets_nothing() -> None:
    cluster = Cluster()
    for _ in range(3):
        cluster.tick("n1")
    assert "n2" not in cluster.state.nodes
    cluster.answer()
    homes = cluster.homes()
    assert sorted([homes["x"], homes["y"]]) == [(), ("n1",)]


def test_a_node_that_came_back_smaller_gets_nothing_that_was_meant_for_what_it_was() -> None:
    cluster = Cluster()
    cluster.register("n2", 1, incarnation=2)
    cluster.answer()
    assert cluster.promised("n2") == 0
    assert cluster.promised("n1") == X.size_bytes


def test_what_came_meanwhile_gives_way_where_the_plan_filled_its_node() -> None:
    cluster = Cluster()
    cluster.step(AdapterAdded(Z))
    (home,) = cluster.homes()["z"]
    cluster.answer()
    assert max(cluster.promised("n1"), cluster.promised("n2")) <= MEMORY, home
    assert cluster.homes()["z"] == ()
    assert "no node has 6 bytes" in cluster.state.routes.adapters[Z.adapter].unrouted_reason


def test_what_came_meanwhile_stays_where_there_is_room() -> None:
    cluster = Cluster(memory=100)
    cluster.step(AdapterAdded(Z))
    home = cluster.homes()["z"]
    assert home
    cluster.answer()
    assert cluster.homes()["z"] == home


@pytest.mark.parametrize("again", [False, True])
def test_a_removed_adapter_gets_no_home(again: bool) -> None:
    cluster = Cluster(memory=100)
    cluster.step(AdapterRemoved(X.adapter))
    if again:
        cluster.step(AdapterAdded(X))
    before = cluster.homes()["x"]
    assert bool(before) == again
    cluster.answer()
    assert cluster.homes()["x"] == before


def test_a_new_revision_keeps_the_home_that_it_was_given() -> None:
    cluster = Cluster()
    larger = spec("x", "r2", MEMORY + 1)
    cluster.step(AdapterUpdated(larger))
    cluster.answer()
    assert cluster.homes()["x"] == ()
    assert max(cluster.promised("n1"), cluster.promised("n2")) <= MEMORY


def test_an_answer_that_nobody_awaits_changes_nothing() -> None:
    cluster = Cluster()
    question = cluster.questions[0]
    assert cluster.answer()
    homes = cluster.homes()
    assert cluster.step(PlacementComputed(solve(question))) == []
    assert cluster.homes() == homes


def test_an_answer_of_trouble_is_told_and_ends_the_wait() -> None:
    cluster = Cluster()
    question = cluster.questions.pop()
    effects = cluster.step(PlacementComputed(PlacementAnswer(question, "no luck")))
    assert effects == [TellOperator("no luck", trouble=True)]
    cluster.register("n2", 3 * MEMORY, incarnation=2)
    cluster.tick("n1")
    assert len(cluster.questions) == 1


# Answers that do not come


def troubles(effects: list[Effect]) -> list[str]:
    return [e.message for e in effects if isinstance(e, TellOperator) and e.trouble]


def until_given_up(cluster: Cluster) -> int:
    """Ticks until another question is asked."""
    before = len(cluster.questions)
    for waited in range(1, 10 * SETTINGS.answer_ticks * MOST_PATIENCE):
        cluster.tick("n1", "n2")
        if len(cluster.questions) > before:
            return waited
    raise AssertionError("nothing is asked any more")


def test_an_answer_that_does_not_come_is_given_up_and_asked_for_again() -> None:
    cluster = Cluster()
    assert until_given_up(cluster) == SETTINGS.answer_ticks
    assert cluster.state.failed_placements["overdue"] == 1
    late, asked = cluster.questions
    # What was asked before is not awaited any more, however it ends.
    for event in (PlacementComputed(solve(late)), PlacementFailed(late, "late")):
        assert cluster.step(event) == []
    assert cluster.homes() == {"x": (), "y": (), "z": ()}
    assert cluster.state.failed_placements == {"policy": 1, "overdue": 1}
    cluster.step(PlacementComputed(solve(asked)))
    homes = cluster.homes()
    assert sorted([homes["x"], homes["y"]]) == [("n1",), ("n2",)]


def test_a_placement_that_is_only_slow_is_waited_for_longer_and_longer() -> None:
    cluster = Cluster()
    waits = [until_given_up(cluster) for _ in range(6)]
    assert waits == [SETTINGS.answer_ticks * n for n in (1, 2, 4, 8, 16, 16)]
    cluster.step(PlacementComputed(solve(cluster.questions[-1])))
    assert all(cluster.homes()[name] for name in "xy")
    # One that came in time ends that.
    cluster.register("n2", 3 * MEMORY, incarnation=2)
    cluster.questions.clear()
    cluster.tick("n1")
    assert until_given_up(cluster) == SETTINGS.answer_ticks


def test_what_is_overdue_is_told() -> None:
    cluster = Cluster()
    for _ in range(SETTINGS.answer_ticks - 1):
        for node_id in ("n1", "n2"):
            cluster.step(Heartbeat(node_id, 1, 1, since_generation=1))
        assert troubles(cluster.step(Tick())) == []
    assert troubles(cluster.step(Tick())) == [
        f"a placement was not computed in {SETTINGS.answer_ticks} ticks; asking for another"
    ]


def test_a_placement_that_breaks_is_told_counted_and_tried_again() -> None:
    cluster = Cluster()
    broken = PlacementFailed(cluster.questions.pop(), "ZeroDivisionError: division by zero")
    (why,) = troubles(cluster.step(broken))
    assert "division by zero" in why
    assert cluster.step(broken) == []
    assert cluster.state.failed_placements["error"] == 1
    assert until_given_up(cluster) == SETTINGS.burst_gap_ticks
    cluster.answer()
    assert all(cluster.homes()[name] for name in "xy")


def test_an_answer_that_cannot_be_adopted_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    (question,) = cluster.questions
    with monkeypatch.context() as broken:
        broken.setattr(planner, "peak", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            cluster.answer()
    assert cluster.step(PlacementFailed(question, "it could not be adopted"))
    assert cluster.state.failed_placements["error"] == 1
    until_given_up(cluster)
    cluster.answer()
    assert all(cluster.homes()[name] for name in "xy")
