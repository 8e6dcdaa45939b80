"""Waiting until an adapter can be asked for, by name and by the revision that an update brought."""

import asyncio

import pytest
from fake_controller import adapter_route, fake_controller, node_route, routes
from fake_node import until
from request_site import run

from loraserve import AsyncClient
from loraserve.errors import DeadlineExceededError
from loraserve.v1 import common_pb2, controller_pb2

N1 = node_route("n1", "127.0.0.1:1")
OLD, NEW = "a" * 64, "b" * 64


def pointed(*revisions: str) -> controller_pb2.AdapterRoute:
    """`sql` means the first of the revisions; n1 holds the others."""
    held = controller_pb2.RouteHolder(
        node_id="n1", weight=100, state=common_pb2.RESIDENCY_STATE_DEVICE
    )
    route = adapter_route("sql")
    route.revision = revisions[0]
    route.revisions.extend(
        controller_pb2.RevisionRoute(revision=one, holders=[held]) for one in revisions[1:]
    )
    return route


def test_after_an_update_it_is_the_new_revision_that_is_waited_for() -> None:
    async def test() -> None:
        first = routes(1, nodes=[N1], adapters=[pointed(OLD, OLD)])
        async with fake_controller(first) as control, AsyncClient(control.address) as client:
            await client.wait_routable(["sql"])
            waiting = asyncio.create_task(client.wait_routable(["sql"], revision=NEW))
            for version, route in ((2, pointed(OLD, OLD, NEW)), (3, pointed(NEW, OLD))):
                await until(lambda: control.open_watches == 1, "the watch stands")
                control.send(routes(version, full=False, adapters=[route]))
                await until(lambda at=version: client.routes.version == at, "seen")  # type: ignore[misc]
                await asyncio.sleep(0.05)  # a wait that ends too early has ended by now
                assert not waiting.done()
            control.send(routes(4, full=False, adapters=[pointed(NEW, OLD, NEW)]))
            await waiting

    run(test)


def test_a_revision_that_never_comes_is_told() -> None:
    async def test() -> None:
        first = routes(1, nodes=[N1], adapters=[pointed(OLD, OLD)])
        async with fake_controller(first) as control, AsyncClient(control.address) as client:
            await client.wait_routable(["sql"])
            with pytest.raises(DeadlineExceededError, match=f"still means revision {OLD[:12]}"):
                await client.wait_routable(["sql"], revision=NEW, timeout_s=0.2)

    run(test)
