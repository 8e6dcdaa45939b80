"""Every policy, whatever the problem, keeps the limits; and what cannot be placed says why."""

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_makers import model

from loraserve.errors import InvalidArgumentError
from loraserve.placement.policies import DEFAULT_POLICY, POLICIES, policy_named
from loraserve.placement.types import (
    AdapterId,
    AdapterSpec,
    Demand,
    NodeCapacity,
    Placement,
    PlacementProblem,
)

MODELS = {True: model(padded=True, adapter_s=1e-4), False: model(adapter_s=1e-4)}


def spec(name: str, rank: int, size: int = 1, base: str = "base") -> AdapterSpec:
    return AdapterSpec(AdapterId("t", base, name), "r", size, rank)


def nodes(count: int, memory: int = 1000, max_rank: int = 0) -> tuple[NodeCapacity, ...]:
    return tuple(NodeCapacity(f"n{i}", "base", memory, max_rank) for i in range(count))


@st.composite
def problems(draw: st.DrawFn) -> PlacementProblem:
    bases = st.sampled_from(["base", "base", "other"])
    fleet = tuple(
        NodeCapacity(
            f"n{i}",
            draw(bases),
            draw(st.integers(0, 80)),
            draw(st.sampled_from([0, 0, 16])),
            draw(st.sampled_from(["", "", "rack1", "rack2"])),
            draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])),
        )
        for i in range(draw(st.integers(0, 6)))
    )
    ids = [node.node_id for node in fleet] + ["gone"]
    specs = tuple(
        spec(f"a{i}", draw(st.integers(1, 64)), draw(st.integers(0, 30)), draw(bases))
        for i in range(draw(st.integers(0, 14)))
    )
    current = {
        s.adapter: tuple(draw(st.lists(st.sampled_from(ids), unique=True, max_size=3)))
        for s in specs
        if draw(st.booleans())
    }
    rates = st.sampled_from([0.0, 1e-9, 1.0, 300.0, 3000.0, 1e5])
    demand = {s.adapter: Demand(draw(rates), draw(rates)) for s in specs if draw(st.booleans())}
    forbidden = frozenset(
        (s.adapter, draw(st.sampled_from(ids))) for s in specs if draw(st.integers(0, 3)) == 0
    )
    shares = {a: (1.0, *([0.0] * (len(n) - 1))) for a, n in current.items() if n}
    return PlacementProblem(
        specs,
        fleet,
        demand,
        current,
        forbidden,
        draw(st.integers(1, 3)),
        draw(st.sampled_from([{}, shares])),
        draw(st.sampled_from([None, None, 0, 20])),
        MODELS[draw(st.booleans())],
    )


def able(problem: PlacementProblem, s: AdapterSpec, node: NodeCapacity) -> bool:
    return (
        node.base == s.adapter.base
        and not (node.max_rank and s.max_rank > node.max_rank)
        and (s.adapter, node.node_id) not in problem.forbidden
    )


def domain(node: NodeCapacity) -> object:
    return node.domain or (node.node_id,)


def check_limits(problem: PlacementProblem, made: Placement) -> None:
    specs = {s.adapter: s for s in problem.adapters}
    fleet = {n.node_id: n for n in problem.nodes}
    assert set(made.holders) | set(made.unplaced) == set(specs)
    assert not set(made.holders) & set(made.unplaced)
    assert all(made.unplaced.values())
    used = dict.fromkeys(fleet, 0)
    for adapter, held in made.holders.items():
        assert 1 <= len(held) == len(set(held))
        for node_id in held:
            assert able(problem, specs[adapter], fleet[node_id])
            used[node_id] += specs[adapter].size_bytes
        shares = made.shares[adapter]
        assert len(shares) == len(held)
        assert min(shares) >= 0
        assert math.isclose(sum(shares), 1.0, abs_tol=1e-9)
        weights = made.weights(adapter)
        assert set(weights) == set(held)
        assert all(isinstance(w, int) and w > 0 for w in weights.values())
    assert all(used[i] <= n.adapter_memory_bytes for i, n in fleet.items())
    check_nothing_left_undone(problem, made, used, specs, fleet)


def check_nothing_left_undone(
    problem: PlacementProblem,
    made: Placement,
    used: Mapping[str, int],
    specs: Mapping[AdapterId, AdapterSpec],
    fleet: Mapping[str, NodeCapacity],
) -> None:
    for adapter, s in specs.items():
        held = made.holders.get(adapter, ())
        domains = {domain(fleet[n]) for n in held}
        for i, node in fleet.items():
            room = used[i] + s.size_bytes <= node.adapter_memory_bytes
            if i in held or not room or not able(problem, s, node):
                continue
            assert held, "unplaced, though a node has room"
            assert len(held) >= problem.replicas, "a replica less, though a node has room"
            if domain(node) not in domains:
                assert len(domains) >= problem.replicas, "replicas share a domain without need"


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=120, deadline=None)
@given(problem=problems())
def test_every_limit_holds(name: str, problem: PlacementProblem) -> None:
    made = POLICIES[name](problem)
    check_limits(problem, made)
    assert POLICIES[name](problem) == made


def test_room_that_the_last_moves_leave_is_used() -> None:
    """A hot adapter is split after the replicas were dealt out; another's copy moves for it."""
    sizes = [0, 0, 0, 16, 0, 1, 3, 4, 7, 6, 11]
    ranks = [1, 1, 1, 1, 1, 1, 3, 2, 1, 1, 1]
    specs = tuple(spec(f"a{i}", *rs) for i, rs in enumerate(zip(ranks, sizes, strict=True)))
    fleet = tuple(
        NodeCapacity(f"n{i}", "base", memory, 16 if i == 0 else 0, speed=speed)
        for i, (memory, speed) in enumerate([(15, 1.0), (13, 1.0), (43, 0.5), (0, 1.0), (8, 1.0)])
    )
    demand = {specs[i].adapter: Demand(0.0, d) for i, d in ((4, 1e-9), (6, 1e-9), (7, 300.0))}
    problem = PlacementProblem(
        specs, fleet, demand, {specs[5].adapter: ("n0",)}, replicas=3, load=MODELS[False]
    )
    check_limits(problem, POLICIES["rank_aware"](problem))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_why_an_adapter_is_nowhere(name: str) -> None:
    specs = (
        spec("big", 8, 5000),
        spec("tall", 512),
        spec("foreign", 8, 1, "other"),
        spec("ill", 8),
        spec("late", 8, 700),
        spec("later", 8, 600),
        spec("last", 8, 600),
    )
    forbidden = frozenset((specs[3].adapter, f"n{i}") for i in range(2))
    made = POLICIES[name](PlacementProblem(specs, nodes(2, max_rank=128), forbidden=forbidden))
    reasons = {a.name: why for a, why in made.unplaced.items()}
    left_out = {"late", "later", "last"} & reasons.keys()
    assert len(left_out) == 1
    size = next(s.size_bytes for s in specs if s.adapter.name in left_out)
    assert reasons == {
        "big": "no node has 5000 bytes of adapter memory",
        "tall": "rank 512 is over the limit of every node",
        "foreign": "no node serves the base 'other'",
        "ill": "loading failed on every node",
        left_out.pop(): f"no node has {size} bytes of adapter memory left",
    }


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"request_level"}))
def test_adapters_without_demand_get_their_replicas_and_no_more(name: str, replicas: int) -> None:
    specs = tuple(spec(f"a{i}", 8, 1 + i) for i in range(7))
    for demand in ({}, {specs[0].adapter: Demand(5.0, 1.0)}):
        made = POLICIES[name](PlacementProblem(specs, nodes(5), demand, replicas=replicas))
        assert {a: len(n) for a, n in made.holders.items() if a not in demand} == {
            s.adapter: replicas for s in specs if s.adapter not in demand
        }


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_no_nodes_no_adapters(name: str) -> None:
    made = POLICIES[name](PlacementProblem((spec("a", 8),), ()))
    assert made.holders == {}
    assert list(made.unplaced.values()) == ["no node serves the base 'base'"]
    assert POLICIES[name](PlacementProblem((), nodes(2))) == Placement({}, {})


TWO = (spec("a", 8), spec("b", 8))
BAD = {
    "demand.prefill": PlacementProblem(TWO, nodes(1), {TWO[1].adapter: Demand(math.nan, 0)}),
    "demand.decode": PlacementProblem(TWO, nodes(1), {TWO[0].adapter: Demand(0, -1.0)}),
    "adapters.size_bytes": PlacementProblem((spec("a", 8, -1),), nodes(1)),
    "adapters.max_rank": PlacementProblem((spec("a", -8),), nodes(1)),
    "nodes.adapter_memory_bytes": PlacementProblem(TWO, nodes(1, -5)),
    "nodes.max_rank": PlacementProblem(TWO, nodes(1, 5, -1)),
    "nodes.speed": PlacementProblem(TWO, (NodeCapacity("n", "base", 5, speed=math.inf),)),
    "adapters": PlacementProblem((*TWO, TWO[0]), nodes(1)),
    "nodes": PlacementProblem(TWO, (*nodes(1), *nodes(1))),
    "replicas": PlacementProblem(TWO, nodes(1), replicas=0),
    "byte_budget": PlacementProblem(TWO, nodes(1), byte_budget=-1),
    "current_shares": PlacementProblem(
        TWO,
        nodes(1),
        current={TWO[0].adapter: ("n0",)},
        current_shares={TWO[0].adapter: (math.nan,)},
    ),
}


@pytest.mark.parametrize("field", BAD)
def test_rubbish_is_refused_by_its_name(field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        policy_named(DEFAULT_POLICY)(BAD[field])
    assert caught.value.field == field


def test_infinite_demand_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"demand\.prefill"):
        policy_named("paper")(
            PlacementProblem(TWO, nodes(1), {TWO[0].adapter: Demand(math.inf, 0)})
        )


def test_unknown_policies_are_refused_with_the_names() -> None:
    with pytest.raises(InvalidArgumentError, match="rank_aware"):
        policy_named("best")
    assert DEFAULT_POLICY == "rank_aware"
