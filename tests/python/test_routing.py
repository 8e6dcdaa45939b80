"""Which node gets a request, over tables, loads and a clock made by hand."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_tables import (
    BASE_MODEL,
    SQL,
    SQL_ID,
    Clock,
    Site,
    adapter,
    holder,
    node,
    table,
)

from loraserve.client.route_table import (
    AdapterRoute,
    Holder,
    RevisionRoute,
    RouteTable,
    static_table,
)
from loraserve.client.routing import CostWeights, ObservedLoad, Router, RouteRequest
from loraserve.errors import InvalidArgumentError
from loraserve.placement.types import AdapterId
from loraserve.v1.common_pb2 import (
    RESIDENCY_STATE_DEVICE,
    RESIDENCY_STATE_DISK,
    RESIDENCY_STATE_DRAINING,
    RESIDENCY_STATE_FAILED,
    RESIDENCY_STATE_FETCHING,
    RESIDENCY_STATE_HOST,
    RESIDENCY_STATE_PENDING,
)

MIB = 1 << 20


def test_idle_holders_share_by_weight() -> None:
    for weights in [(50, 50), (75, 25), (60, 40)]:
        routes = table("ab", adapter(holder("a", weights[0]), holder("b", weights[1])))
        share = Site(routes).picks(count=4000)["a"] / 4000
        assert share == pytest.approx(weights[0] / 100, abs=0.03)


def test_three_idle_holders_share_by_weight() -> None:
    routes = table("abc", adapter(holder("a", 50), holder("b", 30), holder("c", 20)))
    picks = Site(routes).picks(count=4000)
    assert [picks[n] / 4000 for n in "abc"] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_requests_that_stay_fill_the_holders_in_proportion_to_their_weight() -> None:
    site = Site(table("ab", adapter(holder("a", 3), holder("b", 1))))
    sent: Counter[str] = Counter()
    for _ in range(200):
        chosen = site.router.pick(SQL)
        assert chosen is not None
        site.router.began(chosen.node_id, 10)
        sent[chosen.node_id] += 1
    assert sent["a"] == pytest.approx(150, abs=2)


def test_the_busiest_of_many_is_never_the_better_of_two_and_the_idlest_does_not_get_all() -> None:
    names = "abcdefgh"
    site = Site(table(names, adapter(*(holder(n) for n in names))))
    for rank, name in enumerate(names):
        site.router.observe(name, ObservedLoad(queued_prefill_tokens=100 * rank))
    picks = site.picks(count=4000)
    assert picks["h"] == 0
    # Of n, the best is in a pair of two with probability 2/n: the herd does not follow it.
    assert picks["a"] / 4000 == pytest.approx(2 / 8, abs=0.03)
    assert picks["a"] > picks["d"] > picks["g"] > 0


@pytest.mark.parametrize(
    "load",
    [
        ObservedLoad(running_requests=1),
        ObservedLoad(queued_requests=1),
        ObservedLoad(queued_prefill_tokens=1),
        ObservedLoad(free_pages=5, total_pages=100),
    ],
)
def test_every_kind_of_load_counts_against_a_node(load: ObservedLoad) -> None:
    site = Site(table("ab", adapter(holder("a"), holder("b"))))
    site.router.observe("a", load)
    assert site.only() == "b"


def test_free_pages_count_only_where_they_are_few() -> None:
    site = Site(table("ab", adapter(holder("a"), holder("b"))))
    site.router.observe("a", ObservedLoad(free_pages=10, total_pages=100))
    assert set(site.picks()) == {"a", "b"}
    # A node that tells no pages is not a full one.
    site.router.observe("a", ObservedLoad(free_pages=0, total_pages=0))
    assert set(site.picks()) == {"a", "b"}


def test_a_stale_load_is_believed_less_and_less() -> None:
    site = Site(table("ab", adapter(holder("a"), holder("b"))))
    site.router.observe("a", ObservedLoad(queued_prefill_tokens=1000))
    site.clock.now += 2 * Router.LOAD_HALF_LIFE_S
    site.router.observe("b", ObservedLoad(queued_prefill_tokens=240))
    assert site.only() == "b"  # 250 of the 1000 are left
    site.clock.now = 1000.0
    site.router.observe("a", ObservedLoad(queued_prefill_tokens=1000))
    site.clock.now += 2 * Router.LOAD_HALF_LIFE_S
    site.router.observe("b", ObservedLoad(queued_prefill_tokens=260))
    assert site.only() == "a"
    site.clock.now += 5000 * Router.LOAD_HALF_LIFE_S
    assert set(site.picks()) == {"a", "b"}


@pytest.mark.parametrize(
    "load",
    [
        ObservedLoad(running_requests=10),
        ObservedLoad(queued_requests=10),
        ObservedLoad(queued_prefill_tokens=10),
        ObservedLoad(free_pages=5, total_pages=100),
    ],
)
def test_every_kind_of_load_is_forgotten_alike(load: ObservedLoad) -> None:
    site = Site(table("a"))
    site.router.observe("a", load)
    fresh = site.router.cost(holder("a"))
    site.clock.now += 3 * Router.LOAD_HALF_LIFE_S
    assert site.router.cost(holder("a")) == fresh / 8


def test_own_requests_count_before_the_node_tells_of_them_and_not_twice_after() -> None:
    site = Site(table("ab", adapter(holder("a"), holder("b"))))
    cost = site.router.cost
    ticket = site.router.began("a", 300)
    assert cost(holder("a")) == 300 + CostWeights.running_request
    site.clock.now += 0.1
    site.router.observe("a", ObservedLoad(running_requests=1))
    assert cost(holder("a")) == pytest.approx(CostWeights.running_request)
    site.router.ended("a", ticket)
    site.router.observe("a", ObservedLoad())
    assert cost(holder("a")) == 0 == cost(holder("b"))
    site.router.ended("a", ticket)
    site.router.ended("nobody", ticket)


def test_a_stale_report_does_not_hide_own_requests_that_still_run() -> None:
    site = Site(table("ab", adapter(holder("a"), holder("b"))))
    for _ in range(3):
        site.router.began("a", 10)
    site.clock.now += 0.1
    site.router.observe("a", ObservedLoad(running_requests=3))
    site.clock.now += 100
    assert site.router.cost(holder("a")) == 3 * CostWeights.running_request


def test_a_copy_that_is_not_installed_costs_by_its_size() -> None:
    site = Site(table("abcde", adapter(holder("a"))))
    w = CostWeights()
    for state, want in {
        RESIDENCY_STATE_DEVICE: 0.0,
        RESIDENCY_STATE_HOST: 10 * w.host_install_per_mib,
        RESIDENCY_STATE_DISK: w.fetch + 10 * w.fetch_per_mib,
        RESIDENCY_STATE_FETCHING: w.fetch + 10 * w.fetch_per_mib,
        RESIDENCY_STATE_PENDING: w.fetch + 10 * w.fetch_per_mib,
    }.items():
        assert site.router.cost(holder("a", state=state), 10 * MIB) == want
    routes = adapter(holder("a", state=RESIDENCY_STATE_HOST), holder("b"), size=10 * MIB)
    assert Site(table("ab", routes)).only() == "b"


# Who may be picked at all


def test_holders_come_first_and_others_only_where_no_holder_is_left() -> None:
    site = Site(table("abc", adapter(holder("a"))))
    assert site.only() == "a"
    spill = replace(SQL, avoid=frozenset("a"))
    assert set(site.picks(spill)) == {"b", "c"}
    assert site.only(replace(spill, spill=False)) is None
    # A holder under load is still better than a node that must load the adapter.
    site.router.observe("a", ObservedLoad(queued_requests=1000))
    assert site.only() == "a"


def test_an_adapter_without_a_route_may_be_anywhere() -> None:
    site = Site(table("ab", adapter(name="sql")))
    for name in ("sql", "unheard-of"):
        assert set(site.picks(RouteRequest("base", name))) == {"a", "b"}
        assert not site.router.has_holder(RouteRequest("base", name))


def test_holders_of_another_revision_are_not_holders() -> None:
    first = RevisionRoute("r1", (holder("a"),))
    second = RevisionRoute("r2", (holder("b"),))
    route = AdapterRoute(AdapterId("default", "base", "sql"), "r2", (first, second))
    site = Site(table("abc", route))
    assert site.only() == "b"
    assert site.only(replace(SQL, revision="r1")) == "a"
    assert set(site.picks(replace(SQL, revision="r1", avoid=frozenset("a")))) == {"b", "c"}
    assert not site.router.has_holder(replace(SQL, revision="r3"))


@pytest.mark.parametrize("state", [RESIDENCY_STATE_DRAINING, RESIDENCY_STATE_FAILED])
def test_a_copy_that_goes_is_no_holder(state: int) -> None:
    site = Site(table("ab", adapter(holder("a", state=state), holder("b"))))
    assert site.only() == "b"
    gone = Site(table("ab", adapter(holder("a", state=state))))
    assert not gone.router.has_holder(SQL)


def test_a_holder_that_takes_no_requests_is_no_holder() -> None:
    for routes in (
        table([node("a", draining=True), node("b")], adapter(holder("a"))),
        table("b", adapter(holder("a"))),  # the node left the table before the route did
        table("ab", adapter(holder("a", weight=0))),
    ):
        site = Site(routes)
        assert not site.router.has_holder(SQL)
        assert "b" in site.picks()


def test_draining_nodes_are_never_picked() -> None:
    routes = table([node("a", draining=True), node("b")], adapter(holder("a"), holder("b")))
    site = Site(routes)
    site.router.failed("b")
    for request in (SQL, BASE_MODEL):
        assert site.only(request) == "b"
        assert site.only(replace(request, avoid=frozenset("b"))) is None
    assert Site(replace(routes, every_node=True)).only() == "b"


def test_nodes_of_another_base_are_never_picked() -> None:
    routes = table([node("a", base="other"), node("b")], adapter(holder("a"), holder("b")))
    site = Site(routes)
    assert site.only() == "b"
    assert site.only(BASE_MODEL) == "b"
    assert site.only(RouteRequest("base", "unheard-of")) == "b"
    assert site.only(RouteRequest("third")) is None


def test_the_base_must_be_named_where_nothing_else_tells_it() -> None:
    nodes = [node("a", base="other"), node("b")]
    site = Site(table(nodes, adapter(holder("b"))))
    assert site.only(RouteRequest("", "sql")) == "b"
    for request in (RouteRequest(), RouteRequest("", "unheard-of")):
        with pytest.raises(InvalidArgumentError, match="other") as caught:
            site.router.pick(request)
        assert caught.value.field == "base"
    twice = Site(table(nodes, adapter(holder("b")), adapter(holder("a"), base="other")))
    for call in (twice.router.pick, twice.router.has_holder):
        with pytest.raises(InvalidArgumentError, match="must be named"):
            call(RouteRequest("", "sql"))
    assert twice.only(RouteRequest("other", "sql")) == "a"
    assert set(Site(table("ab")).picks(RouteRequest())) == {"a", "b"}


def test_without_a_controller_every_node_is_a_holder() -> None:
    site = Site(static_table(("h:1", "h:2", "h:3")))
    for request in (SQL, RouteRequest("", "x", "r9"), RouteRequest()):
        assert set(site.picks(request)) == {"h:1", "h:2", "h:3"}
        assert site.router.has_holder(request)
    assert all(n.address == n.node_id for n in site.router.table.nodes.values())
    assert site.only(replace(SQL, avoid=frozenset({"h:1", "h:2"}), spill=False)) == "h:3"


def test_an_empty_table_gives_nobody() -> None:
    assert Site(RouteTable()).only() is None
    assert not Site(RouteTable()).router.has_holder(SQL)


# Anything

_NAMES = "abcde"
_HOLDERS = st.lists(
    st.builds(Holder, st.sampled_from(_NAMES + "x"), st.integers(0, 5), st.integers(0, 7)),
    max_size=6,
    unique_by=lambda h: h.node_id,
)
_NODES = st.lists(
    st.builds(
        node,
        st.sampled_from(_NAMES),
        st.booleans(),
        st.integers(1, 3),
        st.sampled_from(["base", "other"]),
    ),
    max_size=5,
    unique_by=lambda n: n.node_id,
)
_LOADS = st.builds(ObservedLoad, *(st.integers(0, 2**40) for _ in range(5)))


def _event(router: Router, clock: Clock) -> st.SearchStrategy[Callable[[], object]]:
    names = st.sampled_from(_NAMES)
    return st.one_of(
        st.builds(lambda n: lambda: router.failed(n), names),
        st.builds(lambda n, load: lambda: router.observe(n, load), names, _LOADS),
        st.builds(lambda n, t: lambda: router.began(n, t), names, st.integers(0, 10**6)),
        st.builds(lambda s: lambda: setattr(clock, "now", clock.now + s), st.floats(0, 1e6)),
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whoever_is_picked_may_serve_and_nobody_better_was_left_out(data: st.DataObject) -> None:
    holders, nodes = data.draw(_HOLDERS), data.draw(_NODES)
    routes = table(nodes, AdapterRoute(SQL_ID, "r1", (RevisionRoute("r1", tuple(holders)),)))
    clock = Clock()
    router = Router(clock, random.Random(data.draw(st.integers(0, 9))).random, routes)
    for act in data.draw(st.lists(_event(router, clock), max_size=8)):
        act()
    avoid = data.draw(st.frozensets(st.sampled_from(_NAMES)))
    spill = data.draw(st.booleans())
    open_ids = {
        n.node_id for n in nodes if not n.draining and n.base == "base" and n.node_id not in avoid
    }
    serving = {
        h.node_id for h in holders if h.node_id in open_ids and h.weight and h.state not in (6, 7)
    }
    able = open_ids if spill else serving
    chosen = router.pick(RouteRequest("base", "sql", avoid=avoid, spill=spill))
    if chosen is None:
        assert not able
        return
    assert chosen.node_id in able
    assert chosen == routes.nodes[chosen.node_id]
    healthy = {n for n in able if router._healthy(n)}
    if healthy & serving:
        assert chosen.node_id in healthy & serving
    elif healthy:
        assert chosen.node_id in healthy
    elif serving:
        assert chosen.node_id in serving


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_by_weight_for_any_point(weights: list[int], point: float) -> None:
    holders = [holder(str(i), w) for i, w in enumerate(weights)]
    index = Router(Clock(), lambda: point)._draw(holders)
    before = sum(weights[:index])
    reach = point * sum(weights)
    assert before - 1e-9 <= reach <= before + weights[index] + 1e-9
