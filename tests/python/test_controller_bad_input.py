"""What the controller's core is handed and cannot be: typed errors that change nothing, or no
effect; and how often it places."""

import asyncio
from itertools import count, pairwise
from pathlib import Path

import pytest
from controller_fixtures import controller

from loraserve.controller.events import (
    AdapterAdded,
    AdapterUpdated,
    DemandSample,
    Heartbeat,
    NodeRecord,
    NodeRegistered,
    TellOperator,
    Tick,
)
from loraserve.controller.state import ControllerState, Settings
from loraserve.errors import AlreadyExistsError, InvalidArgumentError, LoraServeError
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec, Placement, PlacementProblem

POLICY = policy_named("rank_aware")
SQL = AdapterSpec(AdapterId("t", "base", "sql"), "r1", 10, 8)


def with_nodes(state: ControllerState, *names: str, memory: int = 1000) -> None:
    for name in names:
        state.step(NodeRegistered(NodeRecord(name, 1, f"{name}:1", "base", "", memory)))
        state.step(Heartbeat(name, 1, 1))


def test_a_registry_with_a_name_twice_is_refused() -> None:
    with pytest.raises(AlreadyExistsError):
        ControllerState(Settings(), POLICY, 1, [(SQL,), (SQL,)])


@pytest.mark.parametrize(
    "event",
    [
        AdapterAdded(AdapterSpec(SQL.adapter, "r2", 10, 8)),
        AdapterUpdated(AdapterSpec(SQL.adapter, "r2", -1, 8)),
        AdapterAdded(AdapterSpec(AdapterId("t", "base", "new"), "r2", 10, -8)),
        AdapterUpdated(AdapterSpec(AdapterId("t", "base", "new"), "r2", 10, 8)),
        NodeRegistered(NodeRecord("n2", 1, "n2:1", "base", "", -1)),
        NodeRegistered(NodeRecord("n2", 1, "n2:1", "base", "", 1, speed=float("inf"))),
        NodeRegistered(NodeRecord("n2", 1, "n2:1", "base", "", 1), heard_epoch=2),
        NodeRegistered(NodeRecord("n1", 0, "n1:1", "base", "", 1)),
    ],
)
def test_what_is_refused_changed_nothing(event: object) -> None:
    state = ControllerState(Settings(), POLICY, 1, [(SQL,)])
    with_nodes(state, "n1")
    state.step(Tick())
    before = (
        state.routes,
        state.target(SQL.adapter),
        dict(state.nodes),
        state.history(SQL.adapter),
    )
    with pytest.raises(LoraServeError):
        state.step(event)  # type: ignore[arg-type]
    after = (state.routes, state.target(SQL.adapter), dict(state.nodes), state.history(SQL.adapter))
    assert after == before


def test_a_policy_that_fails_moves_nothing_and_is_told() -> None:
    calls = count()

    def policy(problem: PlacementProblem) -> Placement:
        if next(calls):
            raise InvalidArgumentError("demand.prefill", "nan")
        return Placement({s.adapter: ("n1",) for s in problem.adapters}, {})

    state = ControllerState(Settings(placement_interval_ticks=3), policy, 1, [(SQL,)])
    with_nodes(state, "n1")
    effects = []
    for _ in range(7):
        state.step(Heartbeat("n1", 1, 1))
        effects += state.step(Tick())
    assert state.target(SQL.adapter).nodes == ("n1",)
    troubles = [e.message for e in effects if isinstance(e, TellOperator) and e.trouble]
    assert troubles == ["placement failed, all stays where it is: demand.prefill: nan"] * 2


def test_without_nodes_everything_has_a_reason() -> None:
    state = ControllerState(Settings(), POLICY, 1, [(SQL,)])
    for _ in range(5):
        state.step(Tick())
    (route,) = state.routes.adapters.values()
    assert route.unrouted_reason == "no node serves the base 'base'"
    assert state.wanted["base"].nodes == 1


def test_an_adapter_over_every_nodes_memory_has_a_reason() -> None:
    state = ControllerState(Settings(), POLICY, 1)
    with_nodes(state, "n1", "n2", memory=100)
    state.step(AdapterAdded(AdapterSpec(SQL.adapter, "r1", 500, 8)))
    (route,) = state.routes.adapters.values()
    assert route.unrouted_reason == "no node has 500 bytes of adapter memory"


def test_bursts_place_at_once_but_not_again_and_again() -> None:
    settings = Settings(placement_interval_ticks=1000, burst_check_ticks=2, burst_gap_ticks=10)
    state = ControllerState(settings, POLICY, 1, [(SQL,)])
    with_nodes(state, "n1", "n2")
    placed = []
    for tick in range(60):
        # Each burst is placed for as it is: only what grows goes on to be one.
        tokens = 3000 * 9 ** ((tick - 20) // 8) if tick >= 20 else 0
        sample = DemandSample(SQL.adapter, tokens, tokens)
        state.step(Heartbeat("n1", 1, 1, demand=(sample,) if tokens else ()))
        state.step(Heartbeat("n2", 1, 1))
        before = state.placements
        state.step(Tick())
        if state.placements > before:
            placed.append(tick + 1)
    assert placed[0] == 1  # the nodes
    assert placed[1] == 22  # two ticks after it began
    assert len(placed) >= 3
    assert all(b - a >= 10 for a, b in pairwise(placed))


def test_a_clock_that_goes_back_does_not_turn_an_adapters_times_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = count(10**18, -(10**15))
    monkeypatch.setattr("loraserve.controller.server.time.time_ns", lambda: next(times))

    async def run() -> None:
        async with controller(tmp_path) as site:
            made = await site.create("sql", b"PACKED base 8 one")
            changed = await site.update("sql", b"PACKED base 8 two")
            assert changed.create_time == made.create_time
            assert changed.update_time.ToMicroseconds() >= made.update_time.ToMicroseconds()

    asyncio.run(asyncio.wait_for(run(), 120))
