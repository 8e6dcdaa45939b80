"""A request that old routes bring to a node without its adapter is sent on, not failed."""

import asyncio
from typing import Any

import pytest
from fake_controller import adapter_route, fake_controller, node_route, routes
from fake_node import until
from request_site import bad_node, client, finish
from request_site import run as run_client

from loraserve.client import request_run
from loraserve.client.retry import RetryPolicy
from loraserve.errors import LoraServeError, StaleRouteError
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import common_pb2
from loraserve.v1.inference_pb2 import GenerateRequest
from loraserve.wire_errors import abort, from_rpc_error

ONE = SamplingParams(max_tokens=1)
A, B = "a" * 64, "b" * 64


def turns_away(error: StaleRouteError) -> Any:
    """As a node does that has dropped the adapter; it loads it where no route was named."""

    async def generate(request: GenerateRequest, context: Any) -> None:
        if request.HasField("routes"):
            await abort(context, error)
        await context.write(finish(0))

    return generate


async def one_token(_: GenerateRequest, context: Any) -> None:
    await context.write(finish(0))


def asked(node: Any) -> list[tuple[int, int]]:
    """(attempt, version of the routes or 0) of each request."""
    return [(r.attempt, r.routes.version) for r in node.requests]


@pytest.fixture
def patient_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever waits for newer routes waits for ever."""
    monkeypatch.setattr(request_run, "NEWER_ROUTES_WAIT_S", 3600.0)


@pytest.mark.usefixtures("patient_routes")
def test_the_holder_that_the_node_names_is_asked_at_once_and_the_node_stays_in_use() -> None:
    async def test() -> None:
        error = StaleRouteError("adapter", "is not here", ("n2",), (1, 6))
        async with bad_node(turns_away(error)) as old, bad_node(one_token) as new:
            nodes = [node_route("n1", old.address), node_route("n2", new.address)]
            adapters = [adapter_route("sql", "n1"), adapter_route("rot13", "n1")]
            table = routes(4, nodes=nodes, adapters=adapters)
            # No retry is allowed: being sent on is none.
            policy = RetryPolicy(max_attempts=1)
            async with (
                fake_controller(table) as control,
                client(policy=policy, controller=control.address) as asks,
            ):
                assert (await asks.answer(ONE, adapter="sql")).attempts == 2
                assert (asked(old), asked(new)) == ([(0, 4)], [(1, 6)])
                # It has not failed: other adapters' requests still go there.
                await asks.answer(ONE, adapter="rot13")
                assert len(old.requests) == 2

    run_client(test)


@pytest.mark.usefixtures("patient_routes")
def test_a_request_that_was_turned_away_waits_for_newer_routes() -> None:
    async def test() -> None:
        error = StaleRouteError("adapter", "is not here")
        async with bad_node(turns_away(error)) as old, bad_node(one_token) as new:
            nodes = [node_route("n1", old.address), node_route("n2", new.address)]
            table = routes(4, nodes=nodes, adapters=[adapter_route("sql", "n1")])
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                task = asyncio.ensure_future(asks.answer(ONE, adapter="sql"))
                await until(lambda: len(old.requests) == 1, "turned away")
                control.send(routes(5, full=False))  # says nothing of it
                await asyncio.sleep(0.1)
                assert not new.requests
                control.send(routes(6, full=False, adapters=[adapter_route("sql", "n2")]))
                await task
                assert (asked(old), asked(new)) == ([(0, 4)], [(1, 6)])

    run_client(test)


@pytest.mark.usefixtures("patient_routes")
def test_another_revision_may_well_be_on_the_node_that_turned_the_request_away() -> None:
    async def test() -> None:
        async def holds_the_new_one(request: GenerateRequest, context: Any) -> None:
            if request.adapter.revision != B:
                await abort(context, StaleRouteError("adapter", "is not here", (), (1, 5)))
            await context.write(finish(0))

        async with bad_node(holds_the_new_one) as node, bad_node(one_token) as other:
            nodes = [node_route("n1", node.address), node_route("n2", other.address)]
            table = routes(4, nodes=nodes, adapters=[adapter_route("sql", "n1")])
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                task = asyncio.ensure_future(asks.answer(ONE, adapter="sql"))
                await until(lambda: len(node.requests) == 1, "turned away")
                sql = adapter_route("sql", "n1")
                sql.revision = sql.revisions[0].revision = B
                control.send(routes(5, full=False, adapters=[sql]))
                await task
                assert [r.adapter.revision for r in node.requests] == [A, B]
                assert not other.requests

    run_client(test)


@pytest.mark.parametrize("nodes", [1, 2])
def test_where_no_holder_shows_up_a_node_is_asked_to_load_it(
    nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_run, "NEWER_ROUTES_WAIT_S", 0.1)

    async def test() -> None:
        error = StaleRouteError("adapter", "is not here", ("gone",), (1, 9))
        async with bad_node(turns_away(error)) as old, bad_node(one_token) as other:
            known = [node_route("n1", old.address), node_route("n2", other.address)][:nodes]
            table = routes(4, nodes=known, adapters=[adapter_route("sql", "n1")])
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                assert (await asks.answer(ONE, adapter="sql")).attempts == 2
                loads = [old, other][nodes - 1]
                assert asked(old)[0] == (0, 4)
                assert asked(loads)[-1] == (1, 0)

    run_client(test)


def test_a_request_that_is_sent_round_and_round_ends() -> None:
    async def test() -> None:
        every = tuple(f"n{i}" for i in range(8))
        async with bad_node(turns_away(StaleRouteError("adapter", "not here", every))) as node:
            table = routes(
                4,
                nodes=[node_route(i, node.address) for i in every],
                adapters=[adapter_route("sql", *every)],
            )
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                done = await asks.answer(ONE, adapter="sql")
        sent = RetryPolicy().max_redirects + 1
        assert asked(node) == [*((i, 4) for i in range(sent)), (sent, 0)]
        assert done.attempts == sent + 1 <= RetryPolicy().most_attempts

    run_client(test)


def test_a_node_that_sends_away_what_it_is_to_load_fails_the_request() -> None:
    async def test() -> None:
        async def never(_: GenerateRequest, context: Any) -> None:
            await abort(context, StaleRouteError("adapter", "not here"))

        every = tuple(f"n{i}" for i in range(8))
        async with bad_node(never) as node:
            table = routes(
                4,
                nodes=[node_route(i, node.address) for i in every],
                adapters=[adapter_route("sql", *every)],
            )
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                with pytest.raises(StaleRouteError, match="not here"):
                    await asks.answer(ONE, adapter="sql")
        assert len(node.requests) == RetryPolicy().max_redirects + 2

    run_client(test)


def test_only_the_holders_that_the_newest_hint_names_are_asked() -> None:
    """An adapter that shrinks from eight copies to one: the table names seven that are gone."""

    async def test() -> None:
        error = StaleRouteError("adapter", "is not here", ("n9",), (1, 6))
        async with bad_node(turns_away(error)) as gone, bad_node(one_token) as left:
            every = [f"n{i}" for i in range(8)]
            nodes = [node_route(i, gone.address) for i in every]
            nodes.append(node_route("n9", left.address))
            table = routes(4, nodes=nodes, adapters=[adapter_route("sql", *every)])
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                for _ in range(3):
                    assert (await asks.answer(ONE, adapter="sql")).attempts == 2
        assert asked(gone) == [(0, 4)] * 3
        assert asked(left) == [(1, 6)] * 3

    run_client(test)


def test_a_newer_hint_replaces_an_older_one() -> None:
    async def test() -> None:
        first = StaleRouteError("adapter", "is not here", ("n2", "n3"), (1, 6))
        second = StaleRouteError("adapter", "is not here", ("n4",), (1, 7))
        async with (
            bad_node(turns_away(first)) as one,
            bad_node(turns_away(second)) as two,
            bad_node(turns_away(first)) as three,
            bad_node(one_token) as four,
        ):
            nodes = [one, two, three, four]
            table = routes(
                4,
                nodes=[node_route(f"n{i + 1}", n.address) for i, n in enumerate(nodes)],
                adapters=[adapter_route("sql", "n1")],
            )
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                await asks.answer(ONE, adapter="sql")
        assert [asked(n) for n in nodes] == [[(0, 4)], [(1, 6)], [], [(2, 7)]]

    run_client(test)


def test_a_hint_that_is_older_than_the_table_counts_nothing() -> None:
    async def test() -> None:
        error = StaleRouteError("adapter", "is not here", ("n3",), (1, 3))
        async with (
            bad_node(turns_away(error)) as old,
            bad_node(one_token) as holder,
            bad_node(one_token) as other,
        ):
            nodes = [old, holder, other]
            table = routes(
                4,
                nodes=[node_route(f"n{i + 1}", n.address) for i, n in enumerate(nodes)],
                adapters=[adapter_route("sql", "n1", "n2")],
            )
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                await asks.answer(ONE, adapter="sql")
        assert [asked(n) for n in nodes] == [[(0, 4)], [(1, 4)], []]

    run_client(test)


@pytest.mark.parametrize(
    "told",
    [
        "1.x",
        "1",
        "",
        "1.-2",
        f"1.{'9' * 5000}",
        f"{'9' * 5000}.1",
        f"1.{1 << 64}",
        f"{1 << 64}.1",
        f"1.{'0' * 20}1",
        "1.\u0663",
        "\u00b2.1",
    ],
)
def test_details_that_make_no_sense_are_no_details(told: str) -> None:
    error = lied_to(told)
    assert isinstance(error, StaleRouteError)
    assert (error.message, error.holders, error.version) == ("gone", ("n1",), (0, 0))


def test_the_largest_version_is_one() -> None:
    most = (1 << 64) - 1
    error = lied_to(f"{most}.{most}")
    assert isinstance(error, StaleRouteError)
    assert error.version == (most, most)
    common_pb2.RouteVersion(epoch=error.version[0], version=error.version[1])


def lied_to(told: str) -> LoraServeError:
    """What a client makes of a peer's word of its routes."""

    class Lying:
        def code(self) -> Any:
            return type("Code", (), {"name": "UNAVAILABLE"})

        def details(self) -> str:
            return "adapter: gone"

        def trailing_metadata(self) -> Any:
            from google.rpc import error_details_pb2, status_pb2

            info = error_details_pb2.ErrorInfo(
                reason="STALE_ROUTE",
                domain="loraserve",
                metadata={"field": "adapter", "holders": ",,n1,", "routes": told},
            )
            status = status_pb2.Status()
            status.details.add().Pack(info)
            return [("grpc-status-details-bin", status.SerializeToString())]

    return from_rpc_error(Lying())  # type: ignore[arg-type]
