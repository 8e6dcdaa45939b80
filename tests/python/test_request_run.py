"""Requests whose nodes fail: the answer comes exactly once, from other nodes."""

import asyncio
from typing import Any

import pytest
from fake_node import until
from request_site import (
    ANSWER,
    PROMPT,
    TOKENS,
    BadNode,
    Generate,
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

from loraserve.client.retry import RetryPolicy
from loraserve.client.types import Completion
from loraserve.errors import ResourceExhaustedError, UnavailableError
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import node_pb2, node_pb2_grpc
from loraserve.v1.inference_pb2 import GenerateRequest
from loraserve.wire import dial
from loraserve.wire_errors import abort


def exact(done: Completion, attempts: int) -> None:
    assert done.token_ids == ANSWER
    assert done.text == "".join(f"<{i}>" for i in ANSWER)
    assert (done.finish_reason, done.attempts) == ("length", attempts)


def test_an_answer_comes_from_one_node() -> None:
    async def test() -> None:
        async with good_node() as (engine, server), client(nodes_table(a=server.address)) as asks:
            done = await asks.answer(SamplingParams(max_tokens=TOKENS, seed=3, logprobs=1))
            exact(done, attempts=1)
            assert (done.node_id, done.seed, done.revision) == ("good", 3, None)
            assert done.logprobs == [-0.5] * TOKENS
            assert done.prompt_tokens == len(PROMPT)
            assert done.cached_prompt_tokens == 3
            assert engine.calls[0]["timeout_s"] > 1000
            # What the node said of its load, and nothing of requests that have ended.
            view = asks.site.router._views["a"]
            assert view.load.total_pages == 100
            assert not view.own

    run(test)


def test_the_key_goes_with_the_request() -> None:
    async def test() -> None:
        async def generate(_: GenerateRequest, context: Any) -> None:
            await context.write(finish(0))

        async with (
            bad_node(generate) as node,
            client(nodes_table(a=node.address), api_key="secret") as asks,
        ):
            await asks.answer(timeout_s=100.0)
            assert node.metadata[0]["authorization"] == "Bearer secret"
            # What is left of the time, for the node to keep to.
            assert 20.0 < node.requests[0].timeout.ToMicroseconds() / 1e6 <= 100.0

    run(test)


# Before the first token


async def _dies(node: "list[BadNode]", context: Any, sent: int = 0) -> None:
    for index in range(sent):
        await context.write(token(index))
    node[0].die()
    await asyncio.Event().wait()


def test_a_node_that_dies_before_the_first_token_is_replaced() -> None:
    async def test() -> None:
        nodes: list[BadNode] = []
        async with (
            bad_node(lambda _, context: _dies(nodes, context)) as bad,
            good_node() as (engine, server),
            client(nodes_table(a=bad.address, b=server.address)) as asks,
        ):
            nodes.append(bad)
            exact(await asks.answer(), attempts=2)
            assert len(bad.requests) == 1
            assert engine.calls[0]["start_index"] == 0
            # It gets nothing for a while.
            exact(await asks.answer(), attempts=1)

    run(test)


def test_a_port_where_nobody_listens_costs_one_attempt() -> None:
    async def test() -> None:
        async with bad_node(abort_with("INTERNAL")) as gone:
            address = gone.address
        async with (
            good_node() as (_, server),
            client(nodes_table(a=address, b=server.address)) as asks,
        ):
            exact(await asks.answer(), attempts=2)

    run(test)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL", "CANCELLED", "UNKNOWN"])
def test_a_server_that_breaks_off_without_a_word_of_ours_is_replaced(code: str) -> None:
    async def test() -> None:
        async with (
            bad_node(abort_with(code)) as bad,
            good_node() as (_, server),
            client(nodes_table(a=bad.address, b=server.address)) as asks,
        ):
            exact(await asks.answer(), attempts=2)
            exact(await asks.answer(), attempts=1)

    run(test)


def _full(seconds: float | None = 0.1) -> Generate:
    async def generate(_: GenerateRequest, context: Any) -> None:
        await abort(context, ResourceExhaustedError("requests", "64 are here", seconds))

    return generate


def test_a_full_node_is_left_for_another_at_once() -> None:
    async def test() -> None:
        async with (
            bad_node(_full(3600.0)) as full,
            good_node() as (_, server),
            client(nodes_table(a=full.address, b=server.address)) as asks,
        ):
            exact(await asks.answer(), attempts=2)
            # It is full, not lost: the next request may ask it.
            await asks.answer()
            assert len(full.requests) == 2

    run(test)


def test_the_only_holder_is_asked_again_after_the_time_it_named() -> None:
    async def test() -> None:
        async def generate(request: GenerateRequest, context: Any) -> None:
            if request.attempt == 0:
                await _full(0.15)(request, context)
            await context.write(finish(0))

        async with bad_node(generate) as node, client(nodes_table(a=node.address)) as asks:
            begin = asyncio.get_running_loop().time()
            await asks.answer()
            assert asyncio.get_running_loop().time() - begin >= 0.15
            assert len(node.requests) == 2

    run(test)


def test_retries_at_full_nodes_have_a_budget() -> None:
    async def test() -> None:
        policy = RetryPolicy(budget_reserve=1, budget_ratio=0.0)
        async with (
            bad_node(_full(0.01)) as full,
            client(nodes_table(a=full.address), policy) as asks,
        ):
            with pytest.raises(ResourceExhaustedError) as caught:
                await asks.answer()
            assert (caught.value.field, caught.value.retry_after_s) == ("requests", 0.01)
            assert len(full.requests) == 2
            with pytest.raises(ResourceExhaustedError):
                await asks.answer()
            assert len(full.requests) == 3

    run(test)


def test_the_only_node_is_asked_again() -> None:
    async def test() -> None:
        async def generate(request: GenerateRequest, context: Any) -> None:
            if request.attempt < 2:
                await abort(context, UnavailableError("node", "is loading its model"))
            for index in range(TOKENS - 1):
                await context.write(token(index))
            await context.write(finish(TOKENS - 1))

        async with bad_node(generate) as node, client(nodes_table(a=node.address)) as asks:
            exact(await asks.answer(), attempts=3)
            assert [r.attempt for r in node.requests] == [0, 1, 2]
            assert asks.site.router._views["a"].failures == 0  # it answers again
            assert len({r.request_id for r in node.requests}) == 1

    run(test)


# After the first token


def test_an_answer_goes_on_where_a_node_died() -> None:
    async def test() -> None:
        nodes: list[BadNode] = []
        async with (
            bad_node(lambda _, context: _dies(nodes, context, sent=2)) as bad,
            good_node() as (engine, server),
            client(nodes_table(a=bad.address, b=server.address)) as asks,
        ):
            nodes.append(bad)
            done = await asks.answer()
            exact(done, attempts=2)
            assert (done.seed, done.node_id) == (9, "good")
            (call,) = engine.calls
            assert (call["prompt"], call["start_index"]) == ([*PROMPT, *ANSWER[:2]], 2)
            assert (call["params"].seed, call["params"].max_tokens) == (9, TOKENS - 2)

    run(test)


async def _breaks_off(*messages: Any, context: Any) -> None:
    for message in messages:
        await context.write(message)


MISBEHAVIOUR: dict[str, list[Any]] = {
    "ends without a last message": [token(0), token(1)],
    "ends without a message": [],
    "leaves a gap": [token(0), token(2)],
    "begins later": [token(1, start=start())],
    "does not say what serves": [token(0, start=None)],
    "repeats what is here": [token(0), token(0), token(1), token(1)],
    "repeats other tokens": [token(0), token(1), token(0, token_ids=[999])],
    "ends too early": [token(0), token(1), finish(0)],
    "changes the revision": [token(0), token(1, start=start(revision="e" * 64))],
    "changes the base": [token(0), token(1, start=start(base={"name": "t", "digest": "x"}))],
    "counts another prompt": [token(0), token(1, start=start(prompt_tokens=99))],
}


@pytest.mark.parametrize("what", MISBEHAVIOUR)
def test_a_node_that_misbehaves_is_replaced_and_harms_no_answer(what: str) -> None:
    async def test() -> None:
        messages = MISBEHAVIOUR[what]
        async with (
            bad_node(lambda _, context: _breaks_off(*messages, context=context)) as bad,
            good_node() as (_, server),
            client(nodes_table(a=bad.address, b=server.address)) as asks,
        ):
            exact(await asks.answer(), attempts=2)
            assert len(bad.requests) == 1

    run(test)


def test_repeated_tokens_are_dropped_and_the_stream_goes_on() -> None:
    async def test() -> None:
        async def generate(_: GenerateRequest, context: Any) -> None:
            for index in range(TOKENS - 1):
                await context.write(token(index))
                await context.write(token(index))
            await context.write(finish(TOKENS - 1))

        async with bad_node(generate) as node, client(nodes_table(a=node.address)) as asks:
            exact(await asks.answer(), attempts=1)

    run(test)


def test_another_revision_cannot_go_on_with_an_answer() -> None:
    async def test() -> None:
        async def other(request: GenerateRequest, context: Any) -> None:
            await context.write(token(request.start_index, start=start(revision="f" * 64)))

        async with (
            bad_node(lambda _, context: _breaks_off(token(0), context=context)) as first,
            bad_node(other) as second,
            good_node() as (_, server),
            client(nodes_table(a=first.address, b=second.address, c=server.address)) as asks,
        ):
            exact(await asks.answer(), attempts=3)
            assert list(second.requests[0].emitted_token_ids) == ANSWER[:1]

    run(test)


def test_where_all_tokens_came_and_the_last_word_was_lost_nobody_is_asked_again() -> None:
    async def test() -> None:
        every = [token(index) for index in range(TOKENS)]
        async with (
            bad_node(lambda _, context: _breaks_off(*every, context=context)) as bad,
            good_node() as (engine, server),
            client(
                nodes_table(a=bad.address, b=server.address), RetryPolicy(max_resumes=0)
            ) as asks,
        ):
            exact(await asks.answer(), attempts=1)
            assert not engine.calls
            # The node is known as lost all the same.
            exact(await asks.answer(), attempts=1)
            assert len(engine.calls) == 1

    run(test)


def test_a_request_that_breaks_every_node_ends() -> None:
    async def test() -> None:
        async def generate(request: GenerateRequest, context: Any) -> None:
            at = request.start_index
            await context.write(token(at, start=start()))

        policy = RetryPolicy(max_resumes=3)
        async with (
            bad_node(generate) as one,
            bad_node(generate) as two,
            client(nodes_table(a=one.address, b=two.address), policy) as asks,
        ):
            with pytest.raises(UnavailableError, match=r"after 4 tokens, attempt 4") as caught:
                await asks.answer()
            assert caught.value.field == "node"
            assert len(one.requests) + len(two.requests) == 4

    run(test)


def test_a_node_that_drains_hands_its_answers_over() -> None:
    async def test() -> None:
        async with (
            good_node(node_id="one") as (first, leaving),
            good_node(node_id="two") as (second, staying),
            client(nodes_table(a=leaving.address, b=staying.address)) as asks,
        ):
            first.stops_at = 2
            asking = asyncio.ensure_future(asks.answer())
            await until(lambda: asks.tokens == 2, "in the middle")
            async with dial(leaving.address) as channel:
                request = node_pb2.DrainRequest()
                request.timeout.FromMilliseconds(1)
                await node_pb2_grpc.NodeServiceStub(channel).Drain(request)
            done = await asking
            exact(done, attempts=2)
            assert second.calls[0]["start_index"] == 2
            assert done.node_id == "two"
            exact(await asks.answer(), attempts=1)

    run(test)


def test_many_answers_survive_the_loss_of_two_of_three_nodes() -> None:
    async def test() -> None:
        async with (
            good_node(0.01, node_id="one") as (one, first),
            good_node(0.01, node_id="two") as (two, second),
            good_node(0.01, node_id="three") as (three, third),
            client(nodes_table(a=first.address, b=second.address, c=third.address)) as asks,
        ):
            # Answers of the first two do not end; there is nobody to go on with them but the third.
            one.stops_at = two.stops_at = 15
            params = SamplingParams(max_tokens=30)
            asking = [asyncio.ensure_future(asks.answer(params)) for _ in range(24)]
            await until(lambda: len(one.calls) > 3 and len(two.calls) > 3, "spread")
            await until(lambda: all(len(log.token_ids) > 5 for log in asks.logs), "in the middle")
            assert first._server is not None
            await first._server.stop(None)
            await until(lambda: not one.live, "the first is rid of its own")
            assert second._server is not None
            await second._server.stop(None)
            for done in await asyncio.gather(*asking):
                assert done.token_ids == [len(PROMPT) + i for i in range(30)]
                assert done.text == "".join(f"<{i}>" for i in done.token_ids)
            assert any(call["start_index"] for call in three.calls)

    run(test)
