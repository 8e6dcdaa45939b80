"""The controller's load model: what it counts demand by, and nodes that it is not made for."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from controller_fixtures import controller

from loraserve.controller.events import (
    AdapterAdded,
    DemandSample,
    Heartbeat,
    NodeRecord,
    NodeRegistered,
    Tick,
)
from loraserve.controller.main import _load_model, _parser
from loraserve.controller.state import ControllerState, Settings
from loraserve.errors import FailedPreconditionError
from loraserve.placement.cost_model import CostModel, Profile, Slo
from loraserve.placement.load import LoadModel, default_load_model
from loraserve.placement.operating_point import LengthMix
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.v1 import controller_pb2
from loraserve.wire_errors import from_rpc_error

# A hundred times as slow as the built-in guess.
SLOW = Profile(
    name="small machine",
    base="tiny",
    device="cpu",
    cost=CostModel(step_s=1e-3, prefill_token_s=1e-2, decode_token_s=4.4e-3),
    max_batch_tokens=128,
    max_sequences=16,
    bytes_per_rank=1000,
)
SLOW_LOAD = LoadModel(SLOW, mix=LengthMix(20, 20, 1))
SQL = AdapterSpec(AdapterId("t", "tiny", "sql"), "r1", 10, 8)


def state_with(load: LoadModel | None, **settings: Any) -> ControllerState:
    policy = policy_named("rank_aware")
    return ControllerState(Settings(**settings), policy, 1, [(SQL,)], load=load)


def register(state: ControllerState, name: str, base: str) -> None:
    state.step(NodeRegistered(NodeRecord(name, 1, f"{name}:1", base, "", 1000)))
    state.step(Heartbeat(name, 1, 1))


def after_ticks(state: ControllerState, ticks: int, tokens: int) -> ControllerState:
    for _ in range(ticks):
        sample = DemandSample(SQL.adapter, tokens, tokens)
        state.step(Heartbeat("n1", 1, 1, demand=(sample,) if tokens else ()))
        state.step(Tick())
    return state


def test_a_node_of_another_base_is_refused_counted_and_leaves_no_trace() -> None:
    state = state_with(SLOW_LOAD)
    register(state, "n1", "tiny")
    before = state.routes
    for times in (1, 2):
        with pytest.raises(FailedPreconditionError, match=r"'other'.*profile of 'tiny'") as refused:
            register(state, "n2", "other")
        assert refused.value.field == "base"
        assert state.ignored == {"base without a profile": times}
    assert (state.routes, list(state.nodes)) == (before, ["n1"])
    # A known node that comes back with another model goes on as it was.
    with pytest.raises(FailedPreconditionError):
        state.step(NodeRegistered(NodeRecord("n1", 2, "n1:1", "other", "", 1000)))
    assert state.nodes["n1"].record.base == "tiny"
    # The built-in guess is of no base.
    anything = state_with(None)
    register(anything, "n1", "tiny")
    register(anything, "n2", "other")
    assert not anything.ignored


def test_wanted_nodes_and_utilisation_follow_the_profile() -> None:
    found = {}
    for name, load in (("slow", SLOW_LOAD), ("guess", default_load_model())):
        state = state_with(load, placement_interval_ticks=5)
        register(state, "n1", "tiny")
        after_ticks(state, 15, 200)
        found[name] = state.wanted["tiny"].nodes, state.utilisation["n1"]
    # 200 prompt and 200 generated tokens a second: at least 2.9 s of the slow machine's work.
    assert found["slow"][0] >= 3
    assert found["slow"][1] > 2.9
    assert found["guess"][0] == 1
    assert found["guess"][1] < 0.1


def test_what_a_burst_is_depends_on_the_profile() -> None:
    placed = {}
    for name, load in (("slow", SLOW_LOAD), ("guess", default_load_model())):
        state = state_with(load, placement_interval_ticks=1000)
        register(state, "n1", "tiny")
        quiet = after_ticks(state, 20, 0).placements
        placed[name] = after_ticks(state, 20, 30).placements - quiet
    assert placed == {"slow": 1, "guess": 0}


def test_a_new_adapter_is_settled_by_the_same_model() -> None:
    """Why an adapter is nowhere comes from the policy, which is asked with the model."""
    asked = []
    policy = policy_named("rank_aware")

    def listening(problem: Any) -> Any:
        asked.append(problem.load)
        return policy(problem)

    state = ControllerState(Settings(), listening, 1, load=SLOW_LOAD)
    register(state, "n1", "tiny")
    state.step(Tick())
    state.step(AdapterAdded(replace(SQL, size_bytes=2000)))
    state.step(Tick())
    assert asked
    assert set(asked) == {SLOW_LOAD}


def test_over_the_wire_it_is_a_typed_error_and_a_metric(tmp_path: Path) -> None:
    async def test() -> None:
        async with controller(
            tmp_path, keys={}, load=SLOW_LOAD, metrics_listen="127.0.0.1:0"
        ) as site:
            request = controller_pb2.RegisterNodeRequest(
                node_id="n1", incarnation=1, address="h:1", adapter_memory_bytes=1 << 20
            )
            request.base.name = "other"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await site.controller.RegisterNode(request)
            error = from_rpc_error(refused.value)
            assert isinstance(error, FailedPreconditionError)
            assert error.field == "base"
            reader, writer = await asyncio.open_connection(
                *site.server.metrics_address.rsplit(":", 1)
            )
            writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = (await reader.read()).decode()
            writer.close()
            assert 'reason="base without a profile"} 1.0' in text
            request.base.name = "tiny"
            await site.controller.RegisterNode(request)

    asyncio.run(test())


def test_the_command_line_makes_the_model() -> None:
    def made(*words: str) -> LoadModel:
        return _load_model(_parser().parse_args(["--data-dir", "d", *words]))

    assert made() == default_load_model()
    shipped = "a100-llama-2-7b-padded"
    options = [
        "--slo-ttft",
        "2",
        "--slo-tbt",
        "0.1",
        "--prompt",
        "100",
        "--output",
        "50",
        "--node-adapters",
        "7",
    ]
    found = made("--profile", shipped, *options)
    assert (found.profile.name, found.profile.base) == (shipped, "Llama-2-7B")
    assert (found.slo, found.mix) == (Slo(2, 0.1), LengthMix(100, 50, 7))
    assert made("--profile", shipped, "--profile-base", "mine").profile.base == "mine"
