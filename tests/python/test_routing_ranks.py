"""What the ranks of requests cost where they would go, and which rank a request has."""

from collections import Counter
from dataclasses import replace

import pytest
from routing_tables import SQL, Site, adapter, holder, table

from loraserve.client.route_table import RankCosts, RevisionRoute
from loraserve.client.routing import ObservedLoad, Router, RouteRequest


def by_rank(costs: RankCosts | None, rank: int) -> Counter[str | None]:
    """Two nodes with as much to do: one runs requests of rank 64, the other of rank 8."""
    route = replace(adapter(holder("a"), holder("b")), revisions=())
    route = replace(
        route, revisions=(RevisionRoute("r1", (holder("a"), holder("b")), max_rank=rank),)
    )
    site = Site(replace(table("ab", route), rank_costs=costs))
    site.router.observe("a", ObservedLoad(running_requests=4, rank_sum=256, max_rank=64))
    site.router.observe("b", ObservedLoad(running_requests=4, rank_sum=32, max_rank=8))
    return site.picks()


def test_without_costs_of_ranks_a_pick_does_not_look_at_them() -> None:
    assert min(by_rank(None, 64).values()) > 60


def test_on_an_engine_that_pads_like_ranks_go_together() -> None:
    """A high rank would slow four requests on "b"; a low one would be slowed on "a"."""
    assert by_rank(RankCosts(padded=0.004), 64) == {"a": 200}
    assert by_rank(RankCosts(padded=0.004), 8) == {"b": 200}


@pytest.mark.parametrize("rank", [8, 64])
def test_where_every_rank_costs_its_own_the_lower_sum_is_less_work(rank: int) -> None:
    assert by_rank(RankCosts(own=0.004), rank) == {"b": 200}


def test_own_requests_count_with_their_ranks() -> None:
    route = adapter(holder("a"), holder("b"))
    site = Site(replace(table("ab", route), rank_costs=RankCosts(own=0.01)))
    site.router.began("a", 10, rank=128)
    site.router.began("b", 10, rank=8)
    assert site.picks() == {"b": 200}


@pytest.mark.parametrize("costs", [RankCosts(own=0.01), RankCosts(padded=0.004)])
def test_ranks_of_own_requests_count_as_long_as_they_run(costs: RankCosts) -> None:
    """However old the node's last word of its load is."""
    route = adapter(holder("a"), holder("b"))
    site = Site(replace(table("ab", route), rank_costs=costs))
    for name, rank in (("a", 128), ("b", 8)):
        for _ in range(10):
            site.router.began(name, 10, rank)
    site.clock.now += 0.1
    for name, rank in (("a", 128), ("b", 8)):
        site.router.observe(name, ObservedLoad(10, rank_sum=10 * rank, max_rank=rank))

    def difference() -> float:
        low = site.router.cost(holder("b"), rank=8)
        return site.router.cost(holder("a"), rank=8) - low

    fresh = difference()
    assert fresh > 0
    for _ in range(5):
        site.clock.now += 4
        assert difference() == pytest.approx(fresh)


def test_the_largest_rank_is_believed_whole_or_not_at_all() -> None:
    site = Site(replace(table("ab"), rank_costs=RankCosts(padded=0.004)))
    site.router.observe("a", ObservedLoad(max_rank=64))
    site.router.began("a", 10, rank=16)

    def joins(rank: int) -> float:
        """What a higher rank than that of the request which runs would cost."""
        cost = site.router.cost
        return cost(holder("a"), rank=rank) - cost(holder("a"), rank=16)

    site.clock.now += Router.LOAD_HALF_LIFE_S
    assert joins(64) == 0 < joins(65)
    site.clock.now += 0.1
    assert joins(16) == 0 < joins(17)


def test_the_rank_of_a_request_is_that_of_the_revision_it_wants() -> None:
    router = Site(table("a", adapter(holder("a")))).router
    assert router.rank_of(SQL) == 8
    assert router.rank_of(RouteRequest("base", "sql", revision="r0")) == 0
    assert router.rank_of(RouteRequest("base")) == 0
