"""`paper` as described: budgets, packing, leftovers, relabelling; and the assignment it uses."""

from dataclasses import replace

import numpy as np
import pytest
from placement_makers import drifted, model, problem
from scipy.optimize import linear_sum_assignment

from loraserve.placement.columns import Entries, bytes_moved, interference, node_ranks
from loraserve.placement.paper import _leftovers, largest_remainder, packed, paper
from loraserve.placement.relabel import assign, assign_greedily, relabel


@pytest.mark.parametrize(
    ("quota", "seats", "expected"),
    [
        ([5.0, 3.0, 2.0], 10, [5, 3, 2]),
        ([0.4, 0.35, 0.25], 4, [2, 1, 1]),
        ([47.0, 16.0, 15.8, 12.0, 6.1, 3.1], 10, [5, 2, 1, 1, 1, 0]),  # Hamilton's textbook case
        ([1.0, 0.0], 3, [3, 0]),
        ([0.0, 0.0], 2, [1, 1]),
    ],
)
def test_largest_remainder(quota: list[float], seats: int, expected: list[int]) -> None:
    assert largest_remainder(np.array(quota), seats).tolist() == expected


def test_budgets_follow_utilisation_and_adapters_split() -> None:
    """Three quarters of the utilisation are rank 8, one quarter rank 64: three nodes and one."""
    p = problem(2, 4, ranks=(8,))
    p = replace(p, rank=np.array([8, 64]), size_bytes=np.array([8000, 64000]))
    points = p.load.points.tokens_per_s
    p = replace(p, prefill=np.array([0.75 * points[8], 0.25 * points[64]]), decode=np.zeros(2))
    entries = packed(p)
    of_low = entries.share[entries.adapter == 0]
    assert sorted(of_low.tolist()) == pytest.approx([1 / 3] * 3)
    assert entries.share[entries.adapter == 1].tolist() == [1.0]
    assert sorted(node_ranks(p, entries).tolist()) == [8, 8, 8, 64]


def test_a_rank_without_a_server_joins_one_with_a_higher_rank() -> None:
    p = problem(3, 2, ranks=(8,))
    p = replace(p, rank=np.array([8, 16, 64]), size_bytes=np.array([1, 1, 1]))
    points = p.load.points.tokens_per_s[p.rank]
    p = replace(p, prefill=np.array([0.5, 0.05, 0.45]) * points, decode=np.zeros(3))
    entries = packed(p)
    at = {a: set(entries.node[entries.adapter == a].tolist()) for a in range(3)}
    assert at[1] <= at[2]
    assert not at[1] & at[0] - at[2]


def test_ranks_are_grouped() -> None:
    p = problem(500, 20, 1)
    assert interference(p, paper(p).entries) < 15


@pytest.mark.parametrize("size", [1, 2, 7, 40, 96])
def test_assignment_is_optimal(size: int) -> None:
    random = np.random.default_rng(size)
    for gain in (
        random.integers(0, 9, (size, size)).astype(float),  # ties
        random.random((size, size)) * 1e9,
        np.zeros((size, size)),
    ):
        found = assign(gain)
        best = gain[linear_sum_assignment(-gain)].sum()
        assert sorted(found.tolist()) == list(range(size))
        assert gain[np.arange(size), found].sum() == pytest.approx(best)


def test_greedy_assignment_is_near_the_optimum() -> None:
    gain = np.random.default_rng(3).random((200, 200)) ** 4
    found = assign_greedily(gain)
    assert sorted(found.tolist()) == list(range(200))
    best = gain[linear_sum_assignment(-gain)].sum()
    assert gain[np.arange(200), found].sum() > 0.95 * best


def test_relabelling_undoes_a_permutation_of_equal_nodes_only() -> None:
    p = problem(200, 8, 2)
    plan = paper(p).entries
    mixed = Entries.of(plan.adapter, np.random.default_rng(0).permutation(8)[plan.node], plan.share)
    now = replace(p, current=plan)
    assert bytes_moved(now, mixed) > 0
    assert bytes_moved(now, relabel(now, mixed)) == 0
    unlike = replace(now, memory=now.memory + np.arange(8))
    assert np.array_equal(relabel(unlike, mixed).node, mixed.node)


def test_relabelling_saves_bytes() -> None:
    p = problem(300, 8, 4)
    plan = paper(p).entries
    turned = Entries.of(plan.adapter, (plan.node + 3) % 8, plan.share)
    later = drifted(p, turned, 0.3, 5)
    assert bytes_moved(later, paper(later).entries) < 0.7 * bytes_moved(later, packed(later))


def test_leftovers_are_charged_by_the_servers_highest_rank() -> None:
    """Server 0 has fewer tokens, and as it runs rank 128, is busier all the same."""
    p = problem(1, 2, ranks=(8,), load=model(rank_s=5e-6))
    points = p.load.points.tokens_per_s
    assert points[128] < 0.9 * points[8]
    top, tokens = np.array([128, 8]), np.array([1000.0, 1100.0])
    _, node, _ = _leftovers(p, [(0, 1.0)], np.array([10.0]), points, top, tokens)
    assert node.tolist() == [1]
