"""Requests of a client that has a controller: where they go, and what they wait for."""

import asyncio
from typing import Any

import pytest
from fake_controller import adapter_route, fake_controller, node_route, routes
from fake_node import until
from request_site import ANSWER, bad_node, client, finish, good_node, run, start, token

from loraserve.client import request_run
from loraserve.client.route_table import (
    AdapterRoute,
    Holder,
    NodeRoute,
    RankCosts,
    RevisionRoute,
    RouteTable,
)
from loraserve.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from loraserve.placement.types import AdapterId
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import common_pb2
from loraserve.v1.inference_pb2 import GenerateRequest
from loraserve.wire_errors import abort

ONE = SamplingParams(max_tokens=1)


async def one_token(_: GenerateRequest, context: Any) -> None:
    await context.write(finish(0))


def test_requests_go_to_the_holder() -> None:
    async def test() -> None:
        async with bad_node(one_token) as one, bad_node(one_token) as two:
            table = routes(
                1,
                nodes=[node_route("n1", one.address), node_route("n2", two.address)],
                adapters=[adapter_route("sql", "n2"), adapter_route("rot13", "n1")],
            )
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                for adapter in ("sql", "rot13", "sql"):
                    await asks.answer(ONE, adapter=adapter)
                assert [r.adapter.name for r in two.requests] == ["sql", "sql"]
                assert [r.adapter.name for r in one.requests] == ["rot13"]
                # Routes go on when the controller does not.
                await control.stop()
                await asks.answer(ONE, adapter="sql")
                assert len(two.requests) == 3

    run(test)


def test_a_request_waits_for_an_adapter_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_run, "HOLDER_WAIT_S", 3600.0)

    async def test() -> None:
        async with bad_node(one_token) as one, bad_node(one_token) as two:
            nodes = [node_route("n1", one.address), node_route("n2", two.address)]
            table = routes(1, nodes=nodes, adapters=[adapter_route("sql")])
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                task = asyncio.ensure_future(asks.answer(ONE, adapter="sql"))
                await until(lambda: control.open_watches == 1, "the watch stands")
                control.send(routes(2, full=False))  # not yet
                await asyncio.sleep(0.1)
                assert not one.requests
                assert not two.requests
                control.send(routes(3, full=False, adapters=[adapter_route("sql", "n2")]))
                await task
                assert [r.adapter.name for r in two.requests] == ["sql"]

    run(test)


def test_a_request_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_run, "HOLDER_WAIT_S", 0.2)

    async def test() -> None:
        now = asyncio.get_running_loop().time
        async with bad_node(one_token) as one:
            table = routes(
                1, nodes=[node_route("n1", one.address)], adapters=[adapter_route("sql")]
            )
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                begin = now()
                # It is loaded where it is asked for.
                await asks.answer(ONE, adapter="sql")
                assert now() - begin >= 0.2
                # From here on, whatever waits for a holder waits for ever.
                monkeypatch.setattr(request_run, "HOLDER_WAIT_S", 3600.0)
                begin = now()
                with pytest.raises(DeadlineExceededError) as caught:
                    await asks.answer(ONE, adapter="sql", timeout_s=0.05)
                assert caught.value.field == "timeout_s"
                assert now() - begin >= 0.05
                # What the table does not know is the node's to find or refuse, at once.
                await asks.answer(ONE, adapter="unheard-of")
                await asks.answer(ONE)

    run(test)


def test_an_unknown_adapter_is_refused_by_the_node() -> None:
    async def test() -> None:
        async with good_node() as (_, server):
            table = routes(1, nodes=[node_route("n1", server.address)])
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                with pytest.raises(NotFoundError) as caught:
                    await asks.answer(adapter="sql")
                assert caught.value.field == "adapter"
                assert (await asks.answer()).token_ids == ANSWER

    run(test)


def test_where_nobody_can_be_asked_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_run, "HOLDER_WAIT_S", 0.05)

    async def test() -> None:
        draining = node_route("n1", "127.0.0.1:1")
        draining.draining = True
        sql = adapter_route("sql", "n9", base="gone")
        async with (
            fake_controller(routes(1)) as control,
            client(controller=control.address) as asks,
        ):

            async def reason(**fields: Any) -> str:
                with pytest.raises(UnavailableError) as caught:
                    await asks.answer(ONE, **fields)
                assert caught.value.field == "nodes"
                return caught.value.message

            assert await reason() == "none has registered with the controller"
            await until(lambda: control.open_watches == 1, "the watch stands")
            control.send(routes(2, nodes=[draining]))
            await until(lambda: asks.site.router.table.version == 2, "table 2")
            assert await reason() == "all are draining"
            with pytest.raises(NotFoundError, match="base: no node serves 'other', but tiny"):
                await asks.answer(ONE, base="other")
            other = node_route("n2", "127.0.0.1:1", base="other")
            control.send(routes(3, nodes=[draining, other], adapters=[sql]))
            await until(lambda: asks.site.router.table.version == 3, "table 3")
            for base in ("", "gone"):
                told = await reason(adapter="sql", base=base, revision="b" * 64)
                assert told == "none serves 'gone', but other, tiny"
            with pytest.raises(InvalidArgumentError, match="base: must be named"):
                await asks.answer(ONE)

    run(test)


def test_without_a_controller_the_first_request_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with fake_controller() as control:
            pass
        async with client(controller=control.address) as asks:
            # Each is given up by the shorter of the two times.
            for timeout_s, table_s in ((None, 0.3), (3600.0, 0.3), (0.1, 3600.0)):
                monkeypatch.setattr(request_run, "FIRST_TABLE_WAIT_S", table_s)
                with pytest.raises(UnavailableError, match=control.address) as caught:
                    await asks.answer(timeout_s=timeout_s)
                assert caught.value.field == "controller"

    run(test)


def test_a_key_that_the_controller_refuses_is_the_error_of_the_request() -> None:
    async def test() -> None:
        async with fake_controller() as control:
            control.refusal = UnauthenticatedError("authorization", "nobody issued this key")
            async with client(controller=control.address, api_key="x") as asks:
                with pytest.raises(UnauthenticatedError, match="nobody issued") as caught:
                    await asks.answer()
                assert caught.value.field == "authorization"

    run(test)


def test_an_answer_goes_on_at_a_holder_of_the_revision_that_began_it() -> None:
    async def test() -> None:
        begun, may_break = start(revision="a" * 64), asyncio.Event()

        async def breaks(_: GenerateRequest, context: Any) -> None:
            await context.write(token(0, start=begun))
            await may_break.wait()

        async def goes_on(_: GenerateRequest, context: Any) -> None:
            await context.write(finish(1, start=begun))

        async with bad_node(breaks) as one, bad_node(goes_on) as two, bad_node(breaks) as new:
            table = routes(
                1,
                nodes=[
                    node_route("n1", one.address),
                    node_route("n2", new.address),
                    node_route("n3", two.address),
                ],
                adapters=[adapter_route("sql", "n1")],
            )
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                task = asyncio.ensure_future(asks.answer(adapter="sql"))
                await until(lambda: asks.tokens == 1, "a token")
                # The name has come to mean another revision, on another node.
                sql = adapter_route("sql", "n3")
                moved = adapter_route("sql", "n2").revisions[0]
                sql.revision = moved.revision = "b" * 64
                sql.revisions.append(moved)
                control.send(routes(2, full=False, adapters=[sql]))
                await until(lambda: asks.site.router.table.version == 2, "table 2")
                may_break.set()
                done = await task
                assert (done.token_ids, done.revision) == (ANSWER[:2], "a" * 64)
                assert two.requests[0].adapter.revision == "a" * 64
                assert not new.requests

    run(test)


def test_a_node_that_left_the_table_is_asked_no_more() -> None:
    async def test() -> None:
        async with bad_node(one_token) as one, bad_node(one_token) as two:
            n1, n2 = node_route("n1", one.address), node_route("n2", two.address)
            async with (
                fake_controller(routes(1, nodes=[n1, n2])) as control,
                client(controller=control.address) as asks,
            ):
                await asks.answer(ONE)
                assert len(one.requests) == 1
                await until(lambda: control.open_watches == 1, "the watch stands")
                control.send(routes(2, full=False, removed_node_ids=["n1"]))
                await until(lambda: asks.site.router.table.version == 2, "table 2")
                await asks.answer(ONE)
                assert (len(one.requests), len(two.requests)) == (1, 1)

    run(test)


def test_the_revision_of_the_table_is_asked_for_and_the_name_alone_where_that_is_gone() -> None:
    async def test() -> None:
        async def only_by_name(request: GenerateRequest, context: Any) -> None:
            if request.adapter.HasField("revision"):
                await abort(context, NotFoundError("adapter", "has no such revision"))
            await context.write(finish(0))

        async with bad_node(one_token) as current, bad_node(only_by_name) as ahead:
            table = routes(
                1,
                nodes=[node_route("n1", current.address), node_route("n2", ahead.address)],
                adapters=[adapter_route("sql", "n1"), adapter_route("rot13", "n2")],
            )
            (route,) = [a for a in table.adapters if a.adapter.name == "sql"]
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                await asks.answer(ONE, adapter="sql")
                await asks.answer(ONE, adapter="rot13")
        assert [r.adapter.revision for r in current.requests] == [route.revision]
        asked = [(r.attempt, r.adapter.HasField("revision")) for r in ahead.requests]
        assert asked == [(0, True), (1, False)]

    run(test)


def test_a_revision_that_the_caller_names_is_not_given_up() -> None:
    async def test() -> None:
        async def refuses(request: GenerateRequest, context: Any) -> None:
            await abort(context, NotFoundError("adapter", "has no such revision"))

        async with bad_node(refuses) as node:
            table = routes(
                1, nodes=[node_route("n1", node.address)], adapters=[adapter_route("sql", "n1")]
            )
            async with (
                fake_controller(table) as control,
                client(controller=control.address) as asks,
            ):
                with pytest.raises(NotFoundError):
                    await asks.answer(ONE, adapter="sql", revision="b" * 64)
        assert [r.adapter.revision for r in node.requests] == ["b" * 64]

    run(test)


@pytest.mark.parametrize("costs", [None, RankCosts(own=0.01)])
def test_an_answer_goes_on_though_its_name_is_of_two_bases_by_now(
    costs: RankCosts | None,
) -> None:
    """The caller named no base, which was clear when the answer began."""

    def sql(base: str, *holders: str) -> AdapterRoute:
        held = tuple(Holder(h, 1, common_pb2.RESIDENCY_STATE_DEVICE) for h in holders)
        revisions = (RevisionRoute("a" * 64, held, 16),)
        return AdapterRoute(AdapterId("default", base, "sql"), "a" * 64, revisions)

    async def test() -> None:
        said = start(revision="a" * 64)
        breaks = asyncio.Event()

        async def breaks_off(_: GenerateRequest, context: Any) -> None:
            await context.write(token(0, start=said))
            await breaks.wait()
            await abort(context, UnavailableError("node", "is lost"))

        async def goes_on(_: GenerateRequest, context: Any) -> None:
            await context.write(finish(1, start=said))

        async with bad_node(breaks_off) as one, bad_node(goes_on) as two:
            nodes = {
                i: NodeRoute(i, n.address, base="tiny") for i, n in {"n1": one, "n2": two}.items()
            }
            route = sql("tiny", "n1", "n2")
            table = RouteTable(1, 1, {route.adapter: route}, nodes, rank_costs=costs)
            async with client(table) as asks:
                router, ranks = asks.site.router, []
                began = router.began

                def noted(node_id: str, prompt_tokens: int, rank: int = 0) -> int:
                    ranks.append(rank)
                    return began(node_id, prompt_tokens, rank)

                router.began = noted  # type: ignore[method-assign]
                task = asyncio.ensure_future(
                    asks.answer(SamplingParams(max_tokens=2), adapter="sql")
                )
                await until(lambda: asks.tokens == 1, "begun")
                both = {r.adapter: r for r in (route, sql("other"))}
                router.set_table(RouteTable(1, 2, both, nodes, rank_costs=costs))
                breaks.set()
                assert (await task).attempts == 2
                assert ranks == [16 if costs else 0] * 2
        (resumed,) = two.requests
        assert (resumed.adapter.base, resumed.start_index) == ("tiny", 1)

    run(test)
