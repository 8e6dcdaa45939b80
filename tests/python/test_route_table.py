"""The client's route table: snapshots, deltas, tables in parts, and who answers to a name."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_tables import SQL_ID, adapter, holder, node, table

from loraserve.client.messages import update_from_wire
from loraserve.client.route_table import (
    AdapterRoute,
    RankCosts,
    RevisionRoute,
    RouteBook,
    RouteTable,
    RouteUpdate,
    static_table,
    updated,
)
from loraserve.controller.events import Residency
from loraserve.controller.route_log import RouteChanges, keys_of
from loraserve.controller.route_messages import messages
from loraserve.controller.routes import AdapterRoute as SentAdapter
from loraserve.controller.routes import NodeRoute as SentNode
from loraserve.controller.routes import RevisionRoute as SentRevision
from loraserve.controller.routes import RouteHolder as SentHolder
from loraserve.controller.routes import RouteTable as SentTable
from loraserve.controller.routes import difference
from loraserve.errors import InvalidArgumentError
from loraserve.placement.types import AdapterId
from loraserve.v1.common_pb2 import RESIDENCY_STATE_HOST
from loraserve.v1.controller_pb2 import RankCosts as WireRankCosts
from loraserve.v1.controller_pb2 import WatchRoutesResponse
from loraserve.wire import MAX_MESSAGE_BYTES

A, B = adapter(holder("a"), name="a"), adapter(holder("b"), name="b")


def snapshot(version: int, *adapters: AdapterRoute, epoch: int = 1, **more: Any) -> RouteUpdate:
    return RouteUpdate(epoch, version, True, adapters, (node("a"),), **more)


def delta(version: int, *adapters: AdapterRoute, epoch: int = 1, **more: Any) -> RouteUpdate:
    return RouteUpdate(epoch, version, False, adapters, **more)


def book(*updates: RouteUpdate) -> RouteBook:
    made = RouteBook()
    for update in updates:
        assert made.take(update)
    return made


def names(routes: RouteTable) -> list[str]:
    return sorted(a.name for a in routes.adapters)


def test_a_snapshot_replaces_all_and_a_delta_changes_what_it_names() -> None:
    first = book(snapshot(1, A)).table
    changed = updated(first, RouteUpdate(1, 2, False, (B,), (node("b"),)))
    assert (names(changed), sorted(changed.nodes)) == (["a", "b"], ["a", "b"])
    assert names(first) == ["a"]  # whoever holds the old table still reads the old table
    moved = adapter(holder("c"), name="a")
    assert updated(changed, delta(3, moved)).find("", "a") == moved
    gone = updated(changed, delta(3, removed_adapters=(A.adapter,), removed_nodes=("b", "zz")))
    assert (names(gone), sorted(gone.nodes)) == (["b"], ["a"])
    whole = updated(changed, RouteUpdate(2, 1, True, (B,), (node("c"),)))
    assert (names(whole), sorted(whole.nodes)) == (["b"], ["c"])
    assert (whole.epoch, whole.version) == (2, 1)


def test_what_is_removed_and_added_in_one_update_is_there() -> None:
    again = delta(2, A, removed_adapters=(A.adapter,), removed_nodes=("a",), nodes=(node("a"),))
    made = updated(book(snapshot(1, A)).table, again)
    assert (names(made), sorted(made.nodes)) == (["a"], ["a"])


@pytest.mark.parametrize("older", [(2, 4), (1, 9), (0, 0)])
@pytest.mark.parametrize("make", [snapshot, delta])
def test_lower_epochs_and_versions_are_refused_and_change_nothing(
    older: tuple[int, int], make: Any
) -> None:
    made = book(snapshot(5, A, epoch=2))
    before = made.table
    assert not made.take(make(older[1], B, epoch=older[0]))
    assert made.table is before


def test_the_same_and_higher_ones_are_taken_and_an_epoch_outweighs_a_version() -> None:
    made = book(snapshot(5, A), delta(5), snapshot(5, A, B), delta(6, removed_adapters=()))
    assert names(made.table) == ["a", "b"]
    assert made.take(snapshot(1, B, epoch=2))
    assert (made.table.epoch, made.table.version, names(made.table)) == (2, 1, ["b"])


def test_a_table_in_parts_is_seen_when_it_is_whole() -> None:
    made = book(snapshot(1, A))
    before = made.table
    assert made.take(snapshot(2, B, more=True))
    assert made.take(delta(2, adapter(name="c"), more=True))
    assert made.table is before
    assert made.take(delta(2, adapter(name="d")))
    assert names(made.table) == ["b", "c", "d"]
    assert made.table.version == 2


def test_a_delta_in_parts_is_seen_when_it_is_whole() -> None:
    made = book(snapshot(1, A), delta(2, B, removed_adapters=(A.adapter,), more=True))
    assert names(made.table) == ["a"]
    assert made.take(delta(2, adapter(name="c")))
    assert names(made.table) == ["b", "c"]


def test_parts_of_a_watch_that_broke_are_forgotten() -> None:
    made = book(snapshot(1, A), delta(2, B, more=True))
    made.begin()
    assert made.take(delta(1))
    assert names(made.table) == ["a"]
    assert made.take(delta(3))
    assert names(made.table) == ["a"]


@pytest.mark.parametrize("at", [(1, 3), (2, 2)])
def test_a_part_of_another_table_is_refused(at: tuple[int, int]) -> None:
    made = book(snapshot(1, A), snapshot(2, B, more=True))
    assert not made.take(delta(at[1], epoch=at[0]))
    assert names(made.table) == ["a"]
    # A whole table needs no beginning.
    assert made.take(snapshot(at[1], epoch=at[0]))
    assert names(made.table) == []


# Names


def test_a_name_is_found_by_base_where_several_have_it() -> None:
    other = adapter(holder("b"), base="other")
    one = adapter(holder("a"))
    routes = table("ab", one, other, adapter(name="alone", base="other"))
    assert routes.find("base", "sql") == one
    assert routes.find("other", "sql") == other
    found = routes.find("", "alone")
    assert found is not None
    assert found.adapter.base == "other"
    assert routes.find("base", "alone") is None
    assert routes.find("", "unheard-of") is None
    assert routes.find("third", "sql") is None
    with pytest.raises(InvalidArgumentError, match="base, other") as caught:
        routes.find("", "sql")
    assert caught.value.field == "base"


def test_of_several_tenants_the_default_one_is_meant() -> None:
    mine = adapter(holder("a"))
    theirs = replace(mine, adapter=SQL_ID._replace(tenant="acme"))
    assert table("a", theirs, mine).find("", "sql") == mine
    assert table("a", theirs).find("base", "sql") == theirs
    strange = replace(mine, adapter=SQL_ID._replace(tenant="bolt"))
    assert table("a", theirs, strange).find("", "sql") is None
    far = replace(mine, adapter=SQL_ID._replace(base="other"))
    with pytest.raises(InvalidArgumentError):
        table("a", theirs, mine, far).find("", "sql")


def test_a_revision_is_the_one_that_is_asked_for_or_what_the_name_points_to() -> None:
    old, new = RevisionRoute("r1", (holder("a"),)), RevisionRoute("r2", (holder("b"),))
    route = AdapterRoute(SQL_ID, "r2", (old, new))
    assert route.of(None) == new
    assert route.of("r1") == old
    assert route.of("r3") is None
    assert AdapterRoute(SQL_ID, "r2", (old,)).of(None) is None


def test_a_list_of_nodes_is_a_table_without_placement() -> None:
    routes = static_table(("h:1", "h:2"))
    assert [n.address for n in routes.nodes.values()] == ["h:1", "h:2"]
    assert routes.every_node
    assert not book(snapshot(1)).table.every_node


# Against the controller that sends them

_SENT_NODES = st.dictionaries(
    st.sampled_from("abc"), st.tuples(st.booleans(), st.integers(1, 3)), max_size=3
)
_SENT_ADAPTERS = st.dictionaries(
    st.sampled_from(["k", "l", "m", "n"]), st.sampled_from("abc"), max_size=4
)


def sent_table(version: int, drawn: tuple[dict[str, Any], dict[str, str]]) -> SentTable:
    nodes = {
        i: SentNode(i, f"{i}:1", drains, incarnation, "base", "d")
        for i, (drains, incarnation) in drawn[0].items()
    }
    adapters = {}
    for name, where in drawn[1].items():
        key = AdapterId("default", "base", name)
        revision = SentRevision("r", (SentHolder(where, 100, Residency.HOST),), 8, 99)
        adapters[key] = SentAdapter(key, "r", (revision,))
    return SentTable(1, version, adapters, nodes)


def everything(adapter: AdapterId) -> bool:
    return True


def copied(routes: RouteTable, of: SentTable) -> bool:
    """Whether the client's table is the controller's."""
    nodes = {
        n.node_id: SentNode(n.node_id, n.address, n.draining, n.incarnation, n.base, n.base_digest)
        for n in routes.nodes.values()
    }
    return nodes == dict(of.nodes) and {
        a: route_holders(r) for a, r in routes.adapters.items()
    } == {
        a: [(h.node_id, 100, 4, 8, 99) for h in r.revisions[0].holders]
        for a, r in of.adapters.items()
    }


def route_holders(route: AdapterRoute) -> list[tuple[Any, ...]]:
    (revision,) = route.revisions
    return [
        (h.node_id, h.weight, h.state, revision.max_rank, revision.size_bytes)
        for h in revision.holders
    ]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(_SENT_NODES, _SENT_ADAPTERS), min_size=1, max_size=5),
    st.sets(st.integers(0, 5)),
)
def test_whatever_the_controller_goes_through_the_client_follows(
    drawn: list[tuple[dict[str, Any], dict[str, str]]], breaks: set[int]
) -> None:
    """`breaks`: where the watch breaks and another one begins with a snapshot."""
    made, sent = RouteBook(), None
    for step, tables in enumerate(drawn):
        now = sent_table(step + 1, tables)
        if step in breaks:
            made.begin()
            sent = None
        changed = keys_of(difference(sent, now)) if sent else None
        for message in messages(RouteChanges(now, changed), everything, "", first=sent is None):
            assert made.take(update_from_wire(message))
        assert copied(made.table, now)
        sent = now


def test_wire_routes_are_read_whole() -> None:
    key = AdapterId("acme", "base", "sql")
    revision = SentRevision("r", (SentHolder("n1", 7, Residency.HOST),), 16, 1000)
    sent = SentTable(
        3,
        4,
        {key: SentAdapter(key, "r", (revision,), "why")},
        {"n1": SentNode("n1", "h:1", True, 5, "base", "digest")},
    )
    (message,) = messages(RouteChanges(sent, None), everything, "", first=True)
    assert update_from_wire(WatchRoutesResponse(more=True)).more
    update = update_from_wire(message)
    assert (update.epoch, update.version, update.full, update.more) == (3, 4, True, False)
    (route,) = update.adapters
    assert (route.adapter, route.revision, route.unrouted_reason) == (key, "r", "why")
    (read,) = route.revisions
    assert (read.revision, read.max_rank, read.size_bytes) == ("r", 16, 1000)
    assert [(h.node_id, h.weight, h.state) for h in read.holders] == [
        ("n1", 7, RESIDENCY_STATE_HOST)
    ]
    (n1,) = update.nodes
    assert (n1.node_id, n1.address, n1.draining, n1.incarnation) == ("n1", "h:1", True, 5)
    assert (n1.base, n1.base_digest) == ("base", "digest")


def test_no_table_is_too_long_for_its_messages() -> None:
    """Names at their limits, long reasons and many copies, at first and when all is gone."""
    count = 6000
    keys = [AdapterId("t" * 60, "b" * 40, f"{i:06d}" + "n" * 40) for i in range(count)]
    holders = tuple(SentHolder(f"node-{k:060d}", 100, Residency.HOST) for k in range(16))
    why = "loading failed: " + "x" * 5000
    many = (SentRevision("a" * 64, holders, 64, 1 << 25),)
    adapters = {k: SentAdapter(k, "a" * 64, () if i % 2 else many, why) for i, k in enumerate(keys)}
    nodes = {f"n{i}": SentNode(f"n{i}", "h" * 200 + ":1", False, 1, "b", "") for i in range(5000)}
    book, sent = RouteBook(), None
    for now in (SentTable(1, 1, adapters, nodes), SentTable(1, 2, {}, {})):
        changed = keys_of(difference(sent, now)) if sent else None
        made = list(messages(RouteChanges(now, changed), everything, "", first=sent is None))
        assert max(m.ByteSize() for m in made) <= 1 << 20 <= MAX_MESSAGE_BYTES // 2
        assert [m.full for m in made] == [sent is None] + [False] * (len(made) - 1)
        for message in made:
            assert book.take(update_from_wire(message))
        assert set(book.table.adapters) == set(now.adapters)
        assert len(book.table.nodes) == len(now.nodes)
        sent = now
        for route in book.table.adapters.values():
            assert len(route.unrouted_reason) == 300


def test_what_ranks_cost_comes_with_the_table_and_stays_with_its_changes() -> None:
    costs = WireRankCosts(own=0.5, padded=0.25)
    table = SentTable(1, 1)
    book = RouteBook()
    for wire in messages(RouteChanges(table, None), everything, "", True, costs):
        assert book.take(update_from_wire(wire))
    assert book.table.rank_costs == RankCosts(0.5, 0.25)
    assert book.take(RouteUpdate(1, 2))
    assert book.table.rank_costs == RankCosts(0.5, 0.25)
    for wire in messages(RouteChanges(table, None), everything, "", True):
        assert book.take(replace(update_from_wire(wire), epoch=2))
    assert book.table.rank_costs is None
