"""Nodes that fail: who is left alone, for how long, and what makes a node a choice again."""

from dataclasses import replace

from routing_tables import BASE_MODEL, SQL, Site, adapter, holder, node, table

from loraserve.client.routing import ObservedLoad, Router


def test_a_failed_node_is_left_alone_until_its_cool_down_is_over() -> None:
    site = Site(table("ab", adapter(holder("a"), holder("b"))))
    site.router.failed("a")
    site.clock.now += 0.99 * Router.FIRST_COOL_DOWN_S
    assert site.only() == "b"
    site.clock.now += 0.02 * Router.FIRST_COOL_DOWN_S
    assert set(site.picks()) == {"a", "b"}


def test_the_cool_down_doubles_up_to_a_bound_and_an_answer_ends_it() -> None:
    site = Site(table("ab"))
    assert [site.fail("a") for _ in range(8)] == [1, 2, 4, 8, 16, 30, 30, 30]
    for _ in range(2000):  # neither overflows nor wraps
        site.clock.now += 100
        site.router.failed("a")
    site.answer("a")
    assert "a" in site.picks(BASE_MODEL)
    assert site.fail("a") == 1


def test_requests_that_fail_together_are_one_failure() -> None:
    site = Site(table("ab"))
    for _ in range(20):
        site.router.failed("a")
    assert site.fail("a") == 1


def test_a_request_from_before_the_failure_does_not_clear_the_node() -> None:
    site = Site(table("ab"))
    old = site.router.began("a", 1)
    site.router.failed("a")
    site.router.answered("a", old)
    site.router.ended("a", old)
    site.router.observe("a", ObservedLoad())
    assert site.only(BASE_MODEL) == "b"
    site.answer("a")
    assert set(site.picks(BASE_MODEL)) == {"a", "b"}


def test_failed_nodes_serve_where_nobody_else_can() -> None:
    site = Site(table("ab", adapter(holder("a"))))
    site.router.failed("a")
    assert site.only() == "b"  # may load it, and is healthy
    site.router.failed("b")
    assert site.only() == "a"  # all have failed: a holder at least
    assert site.only(replace(SQL, avoid=frozenset("a"))) == "b"


def test_failures_of_unknown_nodes_are_ignored() -> None:
    site = Site(table("a"))
    site.router.failed("zz")
    site.router.observe("zz", ObservedLoad(running_requests=9))
    ticket = site.router.began("zz", 5)
    site.router.answered("zz", ticket)
    site.router.ended("zz", ticket)
    site.router.set_table(table([node("a"), node("zz")]))
    assert set(site.picks(BASE_MODEL)) == {"a", "zz"}


def test_a_restarted_node_starts_clean_and_another_table_keeps_the_record() -> None:
    site = Site(table("ab"))
    site.router.failed("a")
    site.router.observe("b", ObservedLoad(queued_prefill_tokens=10))
    site.router.set_table(table("ab", adapter(holder("a"))))
    assert site.only(BASE_MODEL) == "b"
    # A table from before the restart, late: the younger record stays.
    site.router.set_table(table([node("a", incarnation=2), node("b")]))
    assert site.only(BASE_MODEL) == "a"
    site.router.failed("a")
    site.router.set_table(table([node("a", incarnation=1), node("b")]))
    assert site.only(BASE_MODEL) == "b"
