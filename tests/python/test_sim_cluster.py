"""A simulated cluster: nothing is lost, the seed decides everything, adapters move in time."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from loraserve.cli import main
from loraserve.controller.events import Residency
from loraserve.controller.state import Settings
from loraserve.errors import InvalidArgumentError
from loraserve.placement.cost_model import Slo
from loraserve.placement.policies import DEFAULT_POLICY, POLICIES, policy_named
from loraserve.placement.types import Placement, PlacementProblem
from loraserve.profiles.files import load_profile, shipped_profiles
from loraserve.sim.capacity import load_model
from loraserve.sim.cluster import Cluster, ClusterSettings, Failure
from loraserve.sim.host_pool import HostPool, LinkSettings
from loraserve.sim.metrics import max_over_mean
from loraserve.sim.run import SimulationOptions, simulate
from loraserve.sim.sequence import AdapterTable
from loraserve.sim.suite import WorkloadOptions, make_workload
from loraserve.sim.workload import Workload

PROFILE = load_profile("a100-llama-3-8b-proportional")
GIB = 1 << 30


def workload(name: str = "zipf", **changes: Any) -> Workload:
    options: dict[str, Any] = {"adapters": 20, "rate": 12.0, "duration_s": 60.0, "seed": 1}
    return make_workload(name, WorkloadOptions(**(options | changes)))


def cluster(work: Workload, policy: Any = None, **changes: Any) -> Cluster:
    options: dict[str, Any] = {"nodes": 4, "control": Settings(placement_interval_ticks=15)}
    settings = ClusterSettings(**(options | changes))
    load = load_model(PROFILE, Slo(), work, settings.nodes)
    return Cluster(work, PROFILE, policy or policy_named(DEFAULT_POLICY), load, settings)


def run(work: Workload, policy: Any = None, **changes: Any) -> Cluster:
    ran = cluster(work, policy, **changes)
    ran.run()
    return ran


def check_conserved(work: Workload, ran: Cluster) -> None:
    """Every request once and whole: its tokens, and one gap less than tokens."""
    done = sorted(ran.meter.finished, key=lambda s: s.order)
    assert [s.order for s in done] == list(range(len(work)))
    assert ran.meter.lost == 0
    for sequence, request in zip(done, work, strict=True):
        assert sequence.generated == sequence.output_tokens == request.output_tokens
        assert request.time_s < sequence.first_token_s <= sequence.finish_s + 0.001
    for node in ran.nodes:
        assert node.engine.running == node.engine.queue.count == node.engine.memory.kv_used == 0
        assert not node.pool.waiting
        assert node.pool.used_bytes == sum(ran.adapters.sizes[a] for a in node.pool.copies)


def test_every_request_finishes_once() -> None:
    work = workload()
    ran = run(work)
    check_conserved(work, ran)
    assert sum(n.engine.prefilled_tokens for n in ran.nodes) == work.prompt_tokens.sum()
    assert ran.meter.gaps.total == (work.output_tokens - 1).sum()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_seed_decides(policy: str) -> None:
    options = SimulationOptions(
        policy=policy, nodes=3, adapters=15, seed=5, duration_s=30.0, rate=9.0
    )
    one, same = simulate(options), simulate(options)
    assert one == same
    assert simulate(replace(options, seed=6)) != one
    assert one["finished"] == one["requests"]


def test_a_dead_node_loses_nothing() -> None:
    work = workload()
    ran = run(work, failures=(Failure(20.0, 1, 15.0), Failure(40.0, 2, 5.0)))
    assert ran.meter.retries > 0
    done = sorted(ran.meter.finished, key=lambda s: s.order)
    assert [s.order for s in done] == list(range(len(work)))
    assert all(s.generated == s.output_tokens for s in done)
    assert [n.incarnation for n in ran.nodes] == [1, 2, 2, 1]
    # The nodes came back and were given adapters again.
    assert all(n.alive and n.pool.copies for n in ran.nodes)


def test_all_nodes_dead_for_a_while() -> None:
    work = workload(duration_s=20.0)
    ran = run(work, nodes=2, failures=(Failure(8.0, 0, 6.0), Failure(8.0, 1, 6.0)))
    # Clients give up after three attempts; what comes once the routes are empty waits.
    assert len(ran.meter.finished) + ran.meter.lost == len(work)
    arrived = [s.arrival_s for s in ran.meter.finished]
    assert [t for t in work.time_s if t > 12.5] == sorted(t for t in arrived if t > 12.5)


def test_an_overloaded_cluster_leaves_requests_unfinished() -> None:
    work = workload(rate=200.0, duration_s=20.0)
    ran = run(work, nodes=1, drain_s=10.0)
    assert 0 < len(ran.meter.finished) < len(work)
    assert ran.now_s <= 30.0


def everything_on(*nodes: str) -> Any:
    def place(problem: PlacementProblem) -> Placement:
        here = [n.node_id for n in problem.nodes if n.node_id in nodes]
        return Placement({s.adapter: tuple(here) for s in problem.adapters} if here else {}, {})

    return place


def test_the_policy_decides_where() -> None:
    work = workload(rate=2.0)
    ran = run(work, everything_on("n000", "n002"))
    served = [n.engine.prefilled_tokens > 0 for n in ran.nodes]
    assert served == [True, False, True, False]
    assert ran.bytes_moved == 0
    held = {len(n.pool.copies) for n in ran.nodes}
    assert held == {0, 20}


def test_what_moves_is_counted_and_takes_time() -> None:
    calls = []

    def moving(problem: PlacementProblem) -> Placement:
        """To the other node with every call after the warm-up."""
        calls.append(problem)
        node = f"n00{max(0, len(calls) - 6) % 2}"
        return Placement({s.adapter: (node,) for s in problem.adapters}, {})

    work = workload(rate=2.0)
    control = Settings(placement_interval_ticks=15, least_gain=-1.0)
    ran = run(work, moving, nodes=2, link=LinkSettings(1e9, 1e9, 0.1), control=control)
    check_conserved(work, ran)
    whole = sum(ran.adapters.sizes)
    assert len(calls) > 7
    assert ran.bytes_moved >= whole
    assert max(ran.meter.held_bytes) > whole  # load at the target before the drop at the source


def test_adapters_that_no_node_has_room_for_are_waited_for_in_vain() -> None:
    work = workload(rate=1.0, duration_s=10.0)
    ran = run(work, host_bytes=1000, drain_s=5.0)
    assert not ran.meter.finished
    assert ran.now_s <= 15.0


def test_a_host_pool_takes_one_fetch_after_the_other() -> None:
    table = AdapterTable.of((8, 16), bytes_per_rank=10)
    pool = HostPool(240, table, LinkSettings(100.0, 50.0, 1.0))
    assert pool.fetch(0, 5.0, from_peer=True) == pytest.approx(6.8)
    assert pool.fetch(1, 5.0, from_peer=False) == pytest.approx(6.8 + 1 + 3.2)
    assert not pool.serves(0)
    pool.arrived(0)
    assert pool.serves(0)
    pool.use(0)
    assert not pool.drop(0)
    assert pool.copies[0] is Residency.DRAINING
    assert pool.unuse(0)
    assert (0 in pool.copies, pool.used_bytes, pool.fetched_bytes) == (False, 160, 240)
    assert not pool.drop(1)  # on its way: it comes, and is dropped when asked for again
    full = HostPool(100, table, LinkSettings())
    assert full.fetch(1, 0.0, from_peer=True) is None


def test_balance() -> None:
    assert max_over_mean([]) == 1
    assert max_over_mean([[1, 1, 1], [0, 0, 0]]) == 1
    assert max_over_mean([[3, 0, 0]]) == 3


# Errors


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"policy": "nonsense"}, "policy"),
        ({"workload": "nonsense"}, "workload"),
        ({"nodes": 0}, "nodes"),
        ({"adapters": 0}, "adapters"),
        ({"rate": float("inf")}, "rate"),
        ({"interval_s": 0.1}, "interval"),
        ({"slo": Slo(5.0, -1.0)}, "slo_tbt"),
        ({"failures": (Failure(1.0, 99),)}, "failures"),
        ({"lengths": "nonsense"}, "lengths"),
    ],
)
def test_bad_options_are_named(changes: dict[str, Any], field: str) -> None:
    options = SimulationOptions(duration_s=5.0, nodes=2, adapters=5)
    with pytest.raises(InvalidArgumentError) as error:
        simulate(replace(options, **changes))
    assert error.value.field == field


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_can_be_read(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.source
    assert profile.padded == name.endswith("padded")
    assert (profile.cost.token_max_rank_s > 0) == profile.padded


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda p: p.pop("cost"), "cost is missing"),
        (lambda p: p["cost"].update(step_s=float("nan")), "step_s"),
        (lambda p: p["cost"].update(step_s=-1), "step_s"),
        (lambda p: p["cost"].update(extra=1), "extra"),
        (lambda p: p.update(max_sequences="many"), "max_sequences"),
        (lambda p: p.update(max_sequences=10**9), "max_sequences"),
        (lambda p: p["cost"].update(step_s=0, decode_token_s=0), "must take time"),
    ],
)
def test_profiles_are_checked(tmp_path: Any, change: Any, why: str) -> None:
    import dataclasses

    raw = dataclasses.asdict(PROFILE)
    change(raw)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(InvalidArgumentError, match=why):
        load_profile(str(path))
    path.write_text("{")
    with pytest.raises(InvalidArgumentError, match="JSON"):
        load_profile(str(path))
    with pytest.raises(InvalidArgumentError, match="a100"):
        load_profile("nonsense")


def test_profiles_from_before_the_hinges_are_read(tmp_path: Any) -> None:
    raw = asdict(PROFILE)
    for name in ("batch_token_s", "batch_tokens", "spill_byte_s", "cache_bytes", "context_bytes"):
        del raw["cost"][name]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(raw))
    assert load_profile(str(path)) == PROFILE


# The command


def test_the_command_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    words = "simulate --policy rank_aware --workload drift --nodes 3 --adapters 30 --seed 1 --json"
    assert main([*words.split(), "--duration", "20"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {
        "policy", "nodes", "adapters", "requests", "ttft_p50_s", "ttft_p95_s", "tbt_p95_s",
        "throughput_tokens_per_s", "slo_attainment", "bytes_moved", "adapter_bytes_held",
        "max_over_mean_load",
    } <= set(result)  # fmt: skip
    assert (result["policy"], result["nodes"], result["adapters"]) == ("rank_aware", 3, 30)
    assert result["requests"] == result["finished"] > 50


def test_the_command_replays_a_file(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"timestamp": t * 100, "input_length": 50, "output_length": 5} for t in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert main(["simulate", "--trace", str(path), "--nodes", "2", "--fail", "2:0:1"]) == 0
    assert "slo_attainment" in capsys.readouterr().out
    path.write_text("{}\n")
    assert main(["simulate", "--trace", str(path)]) == 2
    assert f"{path}, line 1, column 1: timestamp is missing" in capsys.readouterr().err
    assert main(["simulate", "--policy", "nonsense"]) == 2
    assert "rank_aware" in capsys.readouterr().err


def test_requests_out_of_order_are_refused() -> None:
    one = np.ones(2, dtype=np.int64)
    with pytest.raises(InvalidArgumentError):
        Workload("w", (8, 8), np.array([1.0, 0.0]), one, one, one, 2.0)
