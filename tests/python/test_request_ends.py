"""How requests end that get no answer: deadlines, cancelling, closing, errors."""

import asyncio
from typing import Any

import pytest
from fake_node import until
from request_site import (
    ANSWER,
    PROMPT,
    Client,
    abort_with,
    bad_node,
    client,
    finish,
    good_node,
    nodes_table,
    run,
    start,
    token,
)

from loraserve.client.route_table import NodeRoute, RouteTable
from loraserve.errors import (
    AlreadyExistsError,
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from loraserve.sampling_params import SamplingParams
from loraserve.v1.inference_pb2 import GenerateRequest
from loraserve.wire_errors import abort


async def failed(asks: Client, *args: Any, **fields: Any) -> tuple[LoraServeError, float]:
    """The error of a request, and the seconds until it came."""
    now = asyncio.get_running_loop().time
    begin = now()
    with pytest.raises(LoraServeError) as caught:
        await asks.answer(*args, **fields)
    return caught.value, now() - begin


# Deadlines


@pytest.mark.parametrize(("sent", "timeout_s"), [(0, 0.2), (2, 3.0)])
def test_a_node_that_hangs_costs_the_deadline_and_no_more(sent: int, timeout_s: float) -> None:
    """`timeout_s` leaves a busy machine the time to bring what is sent."""

    async def test() -> None:
        async def hang(_: GenerateRequest, context: Any) -> None:
            for index in range(sent):
                await context.write(token(index))
            await asyncio.Event().wait()

        async with (
            bad_node(hang) as node,
            good_node() as (engine, server),
            client(nodes_table(a=node.address, b=server.address)) as asks,
        ):
            error, seconds = await failed(asks, timeout_s=timeout_s)
            assert isinstance(error, DeadlineExceededError)
            assert error.field == "timeout_s"
            assert error.message == f"{timeout_s:g} s have passed, {sent} tokens came"
            assert seconds >= timeout_s
            await until(lambda: node.ended == len(node.requests), "the call ended at the node")
            assert not engine.calls

    run(test)


def test_a_node_that_keeps_the_deadline_itself_is_believed() -> None:
    async def test() -> None:
        async with (
            good_node(0.03) as (engine, server),
            client(nodes_table(a=server.address)) as asks,
        ):
            # Time enough to come to the node, and far from enough for the answer.
            error, _ = await failed(asks, SamplingParams(max_tokens=100_000), timeout_s=3.0)
            assert isinstance(error, DeadlineExceededError)
            await until(lambda: not engine.live, "the request ended at the node")
            assert len(engine.calls) == 1

    run(test)


def test_a_deadline_that_has_passed_is_told_before_anybody_is_asked() -> None:
    async def test() -> None:
        async with (
            good_node() as (engine, server),
            client(nodes_table(a=server.address)) as asks,
        ):
            for timeout_s in (0.0, -1.0):
                error, _ = await failed(asks, timeout_s=timeout_s)
                assert (error.code, error.field) == ("DEADLINE_EXCEEDED", "timeout_s")
            assert not engine.calls

    run(test)


def test_nobody_waits_for_a_full_node_beyond_the_deadline() -> None:
    async def test() -> None:
        async def full(_: GenerateRequest, context: Any) -> None:
            await abort(context, ResourceExhaustedError("requests", "full", 100.0))

        async with bad_node(full) as node, client(nodes_table(a=node.address)) as asks:
            error, seconds = await failed(asks, timeout_s=90.0)
            assert isinstance(error, ResourceExhaustedError)
            assert seconds < 60

    run(test)


def test_what_is_left_of_the_time_is_what_the_next_node_gets() -> None:
    async def test() -> None:
        async def slow_death(_: GenerateRequest, context: Any) -> None:
            await context.write(token(0))
            await asyncio.sleep(0.3)

        async def rest(_: GenerateRequest, context: Any) -> None:
            await context.write(token(1, start=start()))
            await context.write(finish(2))

        async with (
            bad_node(slow_death) as one,
            bad_node(rest) as two,
            client(nodes_table(a=one.address, b=two.address)) as asks,
        ):
            await asks.answer(SamplingParams(max_tokens=3), timeout_s=100.0)
            assert 20.0 < two.requests[0].timeout.ToMicroseconds() / 1e6 <= 99.7

    run(test)


# Cancelling and closing


def test_leaving_an_answer_ends_it_at_the_node() -> None:
    async def test() -> None:
        async with (
            good_node(0.01) as (engine, server),
            client(nodes_table(a=server.address)) as asks,
        ):
            chunks = asks.run(SamplingParams(max_tokens=10000)).chunks()
            assert (await anext(chunks)).token_ids == ANSWER[:1]
            assert len(engine.live) == 1
            own = asks.site.router._views["a"].own.values()
            assert [tokens for _, tokens, _ in own] == [len(PROMPT)]
            await chunks.aclose()
            await until(lambda: not engine.live and not len(server.node.requests), "freed")
            assert not asks.site.router._views["a"].own
            # That was no fault of the node.
            assert asks.site.router._views["a"].failures == 0

    run(test)


@pytest.mark.parametrize("tokens", [0, 2])
def test_cancelling_the_task_ends_the_request_at_the_node(tokens: int) -> None:
    async def test() -> None:
        async with (
            good_node(0.02 if tokens else 5.0) as (engine, server),
            client(nodes_table(a=server.address)) as asks,
        ):
            task = asyncio.ensure_future(asks.answer(SamplingParams(max_tokens=10000)))
            await until(lambda: bool(engine.calls), "submitted")
            await until(lambda: asks.tokens >= tokens, "tokens")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not engine.live and not len(server.node.requests), "freed")
            assert len(engine.calls) == 1

    run(test)


def test_cancelling_while_a_retry_waits_asks_nobody() -> None:
    async def test() -> None:
        async def full(_: GenerateRequest, context: Any) -> None:
            await abort(context, ResourceExhaustedError("requests", "full", 60.0))

        async with bad_node(full) as node, client(nodes_table(a=node.address)) as asks:
            task = asyncio.ensure_future(asks.answer())
            await until(lambda: node.ended == 1, "refused")
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(node.requests) == 1

    run(test)


def test_closing_the_client_ends_what_runs() -> None:
    async def test() -> None:
        async with (
            good_node(0.01) as (engine, server),
            client(nodes_table(a=server.address)) as asks,
        ):
            task = asyncio.ensure_future(asks.answer(SamplingParams(max_tokens=10000)))
            await until(lambda: bool(engine.live), "running")
            await asks.site.channels.close()
            with pytest.raises(UnavailableError, match="client: is closed"):
                await task
            await until(lambda: not engine.live, "freed")
            error, _ = await failed(asks)
            assert str(error) == "client: is closed"
            assert len(engine.calls) == 1

    run(test)


# Errors


@pytest.mark.parametrize(
    "sent",
    [
        InvalidArgumentError("max_tokens", "must be at least 1"),
        UnsupportedError("grammar", "no"),
        NotFoundError("adapter", "unknown"),
        PermissionDeniedError("authorization", "no"),
        UnauthenticatedError("authorization", "no"),
        AlreadyExistsError("request_id", "runs"),
        FailedPreconditionError("base", "another"),
        CancelledError("attempt", "replaced"),
        ResourceExhaustedError("host_pool_bytes", "never fits"),
        DeadlineExceededError("deadline", "has passed"),
        LoraServeError("server", "internal error"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_no_other_node_can_cure_is_raised_as_the_node_raised_it(sent: LoraServeError) -> None:
    async def test() -> None:
        async def refuse(_: GenerateRequest, context: Any) -> None:
            await abort(context, sent)

        async with (
            bad_node(refuse) as node,
            good_node() as (engine, server),
            client(nodes_table(a=node.address, b=server.address)) as asks,
        ):
            error, _ = await failed(asks)
            assert type(error) is type(sent)
            assert (error.field, error.message) == (sent.field, sent.message)
            assert not engine.calls

    run(test)


def test_a_real_node_names_the_field() -> None:
    async def test() -> None:
        async with (
            good_node() as (_, server),
            client(nodes_table(a=server.address)) as asks,
        ):
            for fields, field in (
                ({"adapter": "nobody"}, "adapter"),
                ({"adapter": "../x"}, "adapter.name"),
                ({"base": "other"}, "base"),  # the table tells, nobody is asked
            ):
                error, _ = await failed(asks, **fields)
                assert error.field == field
            error, _ = await failed(asks, SamplingParams(temperature=-1.0, max_tokens=0))
            assert (error.code, error.field) == ("INVALID_ARGUMENT", "max_tokens")

    run(test)


def test_where_every_node_is_gone_the_last_one_is_named() -> None:
    async def test() -> None:
        addresses = {}
        for name in ("a", "b"):
            async with bad_node(abort_with("INTERNAL")) as gone:
                addresses[name] = gone.address
        async with client(nodes_table(**addresses)) as asks:
            # Without a token no answer can be whole.
            for params in (None, SamplingParams(max_tokens=0)):
                error, _ = await failed(asks, params)
                assert isinstance(error, UnavailableError)
                assert error.field == "node"
                assert any(a in error.message for a in addresses.values())
                assert "attempt 3" in error.message

    run(test)


def test_an_answer_that_cannot_go_on_is_not_an_adapter_that_is_missing() -> None:
    async def test() -> None:
        async def one_token(_: GenerateRequest, context: Any) -> None:
            await context.write(token(0))

        async def unknown(_: GenerateRequest, context: Any) -> None:
            await abort(context, NotFoundError("adapter", "'sql' is not on this node"))

        async with (
            bad_node(one_token) as one,
            bad_node(unknown) as two,
            client(nodes_table(a=one.address, b=two.address)) as asks,
        ):
            error, _ = await failed(asks, adapter="sql")
            assert isinstance(error, UnavailableError)
            assert error.field == "resume"
            assert "after 1 tokens" in error.message
            assert "'sql' is not on this node" in error.message

    run(test)


def test_an_adapter_that_a_node_cannot_load_takes_nothing_from_its_other_adapters() -> None:
    async def test() -> None:
        async def serve(request: GenerateRequest, context: Any) -> None:
            if request.adapter.name == "broken":
                await abort(context, UnavailableError("adapter", "could not be loaded here"))
            await context.write(finish(0))

        async with (
            bad_node(serve) as one,
            bad_node(serve) as two,
            client(nodes_table(a=one.address, b=two.address)) as asks,
        ):
            error, _ = await failed(asks, adapter="broken")
            assert isinstance(error, UnavailableError)
            assert error.field == "adapter"
            assert {r.adapter.name for r in two.requests} == {"broken"}
            await asks.answer(adapter="sql")
            assert one.requests[-1].adapter.name == "sql"

    run(test)


def test_an_answer_goes_on_with_its_base_when_the_table_has_forgotten_the_adapter() -> None:
    async def test() -> None:
        async def one_token(request: GenerateRequest, context: Any) -> None:
            await context.write(token(0))

        async with (
            bad_node(one_token) as one,
            bad_node(one_token) as wrong,
            good_node() as (engine, server),
            client(nodes_table(b=one.address)) as asks,
        ):
            chunks = asks.run().chunks()
            await anext(chunks)
            nodes = {
                "a": NodeRoute("a", wrong.address, base="other"),
                "b": NodeRoute("b", one.address, draining=True, base="tiny"),
                "c": NodeRoute("c", server.address, base="tiny"),
            }
            asks.site.router.set_table(RouteTable(nodes=nodes))
            ids = [i async for chunk in chunks for i in chunk.token_ids]
            assert ids == ANSWER[1:]
            assert not wrong.requests
            assert engine.calls[0]["start_index"] == 1

    run(test)
