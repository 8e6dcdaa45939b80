"""What a node says of adapters that it had, and how it comes to know where they went."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_node import revision, until
from heard_controller import drop, load
from node_calls import answers, refused
from test_heartbeat import play

from loraserve.controller.convert import MAX_TOLD_HOLDERS, command_to_wire
from loraserve.controller.events import Residency, SendDrop
from loraserve.controller.routes import AdapterRoute, RevisionRoute, RouteHolder, RouteTable
from loraserve.errors import StaleRouteError, UnavailableError
from loraserve.node.held import FETCHING, HOST
from loraserve.node.moved import Moved, MovedAdapters
from loraserve.placement.types import AdapterId
from loraserve.v1 import common_pb2

A, B = revision("a"), revision("b")
ROUTES = common_pb2.RouteVersion(epoch=3, version=7)
SQL = AdapterId("default", "tiny", "sql")


def test_a_node_says_where_a_dropped_adapter_went_and_loads_it_where_no_route_was_named(
    tmp_path: Path,
) -> None:
    async def script(fake: Any, server: Any, engine: Any, channel: Any) -> None:
        ref = common_pb2.AdapterRef(name="sql", revision=A)
        fake.send(load(1, "sql", "a"))
        await until(lambda: fake.states == {"sql@a": HOST}, "held")
        assert await answers(channel, adapter=ref, routes=ROUTES)
        command = drop(2, "sql", "a")
        command.drop.holder_node_ids.extend(["n2", "n3"])
        command.drop.routes.CopyFrom(common_pb2.RouteVersion(epoch=3, version=9))
        fake.send(command)
        await until(lambda: fake.states == {}, "gone")
        error = await refused(answers(channel, adapter=ref, routes=ROUTES))
        assert isinstance(error, StaleRouteError)
        assert (error.field, error.holders, error.version) == ("adapter", ("n2", "n3"), (3, 9))
        # Routes that are newer than the drop know more than it.
        newer = common_pb2.RouteVersion(epoch=3, version=9)
        error = await refused(answers(channel, adapter=ref, routes=newer))
        assert isinstance(error, StaleRouteError)
        assert (error.holders, error.version) == ((), (0, 0))
        # One that was never here, and by name alone: nobody knows where.
        never = common_pb2.AdapterRef(name="sql", revision=B)
        for asked in (never, common_pb2.AdapterRef(name="sql")):
            error = await refused(answers(channel, adapter=asked, routes=ROUTES))
            assert isinstance(error, StaleRouteError)
            assert (error.holders, error.version) == ((), (0, 0))
        assert not engine.loaded
        # Without routes the node asks its controller; this one answers nothing of the kind.
        error = await refused(answers(channel, adapter=ref))
        assert type(error) is UnavailableError
        # Where it is wanted again, the old word counts nothing.
        fake.send(load(3, "sql", "a"))
        await until(lambda: fake.states == {"sql@a": HOST}, "held again")
        assert await answers(channel, adapter=ref, routes=ROUTES)
        assert not server.node.moved

    play(tmp_path, script)


def test_a_node_that_is_loading_the_adapter_keeps_the_request(tmp_path: Path) -> None:
    async def script(fake: Any, server: Any, engine: Any, channel: Any) -> None:
        engine.may_load.clear()
        fake.send(load(1, "sql", "a"))
        await until(lambda: fake.states == {"sql@a": FETCHING}, "on its way")
        ref = common_pb2.AdapterRef(name="sql", revision=A)
        task = asyncio.ensure_future(answers(channel, adapter=ref, routes=ROUTES))
        await until(lambda: len(server.node.requests) == 1, "waits")
        engine.may_load.set()
        assert await task

    play(tmp_path, script)


def test_a_node_remembers_the_last_drops_only() -> None:
    moved = MovedAdapters(max_entries=3)
    names = [AdapterId("default", "tiny", f"a{i}") for i in range(5)]
    for i, name in enumerate(names[:4]):
        moved.note((name, A), Moved((f"n{i}",), (1, i)))
    moved.note((names[1], A), Moved(("n9",), (1, 9)))  # the newest again
    moved.note((names[4], A), Moved((), (1, 10)))
    assert len(moved) == 3
    told = [moved.refusal(name, A, (1, 0)).holders for name in names]
    assert told == [(), ("n9",), (), ("n3",), ()]


@pytest.mark.parametrize("routes", [(3, 9), (3, 10), (4, 1)])
def test_a_drop_is_no_news_to_routes_that_are_newer(routes: tuple[int, int]) -> None:
    moved = MovedAdapters()
    moved.note((SQL, A), Moved(("n2",), (3, 9)))
    error = moved.refusal(SQL, A, routes)
    assert (error.holders, error.version) == ((), (0, 0))
    error = moved.refusal(SQL, A, (3, 8))
    assert (error.holders, error.version) == (("n2",), (3, 9))


def test_a_drop_command_says_who_still_holds_the_revision() -> None:
    def holders(*ids: str) -> tuple[RouteHolder, ...]:
        return tuple(RouteHolder(i, 1, Residency.HOST) for i in ids)

    many = [f"n{i}" for i in range(20)]
    old, new = RevisionRoute(A, holders(*many), 8, 100), RevisionRoute(B, holders("x"), 8, 100)
    table = RouteTable(3, 9, {SQL: AdapterRoute(SQL, A, (old, new))})
    message = command_to_wire(SendDrop("n1", 5, SQL, A), table).drop
    told = ["n0", *many[2 : MAX_TOLD_HOLDERS + 1]]
    assert (list(message.holder_node_ids), message.routes.version) == (told, 9)
    # A revision that is gone has no holders; those of another are none of it.
    message = command_to_wire(SendDrop("n1", 6, SQL, "c" * 64), table).drop
    assert (list(message.holder_node_ids), message.routes.epoch) == ([], 3)
