"""Rank-sorted fill: within limits, balanced, neighbours in rank together, little moved."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.placement.rank_fill import rank_fill
from loraserve.placement.types import (
    AdapterId,
    AdapterSpec,
    Demand,
    NodeCapacity,
    PlacementProblem,
)


def spec(name: str, rank: int, size: int = 1, base: str = "base") -> AdapterSpec:
    return AdapterSpec(AdapterId("t", base, name), "r", size, rank)


def nodes(count: int, memory: int = 1000, max_rank: int = 0) -> tuple[NodeCapacity, ...]:
    return tuple(NodeCapacity(f"n{i}", "base", memory, max_rank) for i in range(count))


def test_neighbours_in_rank_share_a_node() -> None:
    specs = tuple(spec(f"a{r}-{i}", r) for r in (4, 128) for i in range(8))
    held = rank_fill(PlacementProblem(specs, nodes(2))).holders
    ranks = {n: {s.max_rank for s in specs if held[s.adapter] == (n,)} for n in ("n0", "n1")}
    assert sorted(map(len, ranks.values())) == [1, 2]  # one boundary between the two groups
    loads = [sum(1 + s.max_rank / 128 for s in specs if held[s.adapter] == (n,)) for n in ranks]
    assert max(loads) <= 1.15 * min(loads)


def test_what_is_placed_stays() -> None:
    specs = tuple(spec(f"a{i}", 8) for i in range(8))
    first = rank_fill(PlacementProblem(specs, nodes(2))).holders
    more = (*specs, spec("new", 64))
    second = rank_fill(PlacementProblem(more, nodes(2), current=first)).holders
    assert {a: second[a] for a in first} == first


def test_a_node_far_over_its_share_is_relieved() -> None:
    specs = tuple(spec(f"a{i}", 8) for i in range(8))
    crowded = {s.adapter: ("n0",) for s in specs}
    held = rank_fill(PlacementProblem(specs, nodes(2), current=crowded)).holders
    assert sorted(sum(h == (n,) for h in held.values()) for n in ("n0", "n1")) == [4, 4]
    assert rank_fill(PlacementProblem(specs, nodes(2), current=held)).holders == held


def test_demand_counts() -> None:
    specs = tuple(spec(f"a{i}", 8) for i in range(4))
    demand = {specs[0].adapter: Demand(prefill=900, decode=100)}
    held = rank_fill(PlacementProblem(specs, nodes(2), demand)).holders
    hot = held[specs[0].adapter]
    assert all(held[s.adapter] != hot for s in specs[1:])


def test_why_an_adapter_is_nowhere() -> None:
    specs = (
        spec("big", 8, 5000),
        spec("tall", 512),
        spec("foreign", 8, 1, "other"),
        spec("ill", 8),
    )
    forbidden = frozenset((specs[3].adapter, f"n{i}") for i in range(2))
    made = rank_fill(PlacementProblem(specs, nodes(2, max_rank=128), forbidden=forbidden))
    assert {a.name: why for a, why in made.unplaced.items()} == {
        "big": "no node has 5000 bytes of adapter memory left",
        "tall": "rank 512 is over the limit of every node",
        "foreign": "no node serves the base 'other'",
        "ill": "loading failed on every node",
    }
    assert made.holders == {}


@st.composite
def problems(draw: st.DrawFn) -> PlacementProblem:
    fleet = tuple(
        NodeCapacity(f"n{i}", draw(st.sampled_from(["base", "other"])), memory, max_rank)
        for i, (memory, max_rank) in enumerate(
            draw(st.lists(st.tuples(st.integers(0, 60), st.sampled_from([0, 16])), max_size=5))
        )
    )
    ids = [node.node_id for node in fleet] + ["gone"]
    specs = tuple(
        spec(f"a{i}", rank, size, base)
        for i, (rank, size, base) in enumerate(
            draw(
                st.lists(
                    st.tuples(
                        st.integers(1, 64), st.integers(1, 30), st.sampled_from(["base", "other"])
                    ),
                    max_size=12,
                )
            )
        )
    )
    current = {
        s.adapter: tuple(draw(st.lists(st.sampled_from(ids), unique=True, max_size=3)))
        for s in specs
    }
    demand = {s.adapter: Demand(draw(st.floats(0, 1e6)), 1.0) for s in specs[::2]}
    forbidden = frozenset((s.adapter, draw(st.sampled_from(ids))) for s in specs[::3])
    return PlacementProblem(specs, fleet, demand, current, forbidden, draw(st.integers(1, 3)))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_every_limit_holds(problem: PlacementProblem) -> None:
    made = rank_fill(problem)
    specs = {s.adapter: s for s in problem.adapters}
    assert set(made.holders) | set(made.unplaced) == set(specs)
    assert not set(made.holders) & set(made.unplaced)
    used = {n.node_id: 0 for n in problem.nodes}
    by_id = {n.node_id: n for n in problem.nodes}
    for adapter, held in made.holders.items():
        s = specs[adapter]
        assert 1 <= len(held) == len(set(held)) <= problem.replicas
        for node_id in held:
            node = by_id[node_id]
            assert node.base == adapter.base
            assert not node.max_rank or s.max_rank <= node.max_rank
            assert (adapter, node_id) not in problem.forbidden
            used[node_id] += s.size_bytes
    assert all(used[i] <= n.adapter_memory_bytes for i, n in by_id.items())
    # Nothing is left out where one node has room for it.
    for adapter in made.unplaced:
        s = specs[adapter]
        for i, node in by_id.items():
            able = node.base == adapter.base and (adapter, i) not in problem.forbidden
            able = able and not (node.max_rank and s.max_rank > node.max_rank)
            assert not able or used[i] + s.size_bytes > node.adapter_memory_bytes
    assert rank_fill(problem) == made
