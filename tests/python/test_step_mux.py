"""A client whose requests share one StepStream per node: as without, none hurts another."""

import asyncio
import contextlib
from typing import Any

import pytest
from fake_node import FakeEngine, serving, until
from node_calls import request, run

from loraserve.client import AsyncClient
from loraserve.client.resume import MAX_REQUEST_BYTES
from loraserve.client.step_mux import CREDIT_STEP
from loraserve.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    UnavailableError,
)
from loraserve.node.lane import START_CREDIT
from loraserve.sampling_params import SamplingParams
from loraserve.wire import MAX_MESSAGE_BYTES


def params(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **more)


def test_a_multiplexed_client_gets_the_same_answers() -> None:
    async def test() -> None:
        async with serving(FakeEngine(step_s=0.001)) as (server, _):
            plain = AsyncClient(nodes=[server.address])
            multiplexed = AsyncClient(nodes=[server.address], multiplex=True)
            async with plain, multiplexed:
                sizes = [1, 2, CREDIT_STEP, START_CREDIT + 3 * CREDIT_STEP]
                asked = [params(n, seed=n, logprobs=1) for n in sizes]

                async def all_of(client: AsyncClient) -> list[Any]:
                    return await asyncio.gather(*(client.generate([5, 6], p) for p in asked))

                wanted, got = await all_of(plain), await all_of(multiplexed)
                for a, b in zip(wanted, got, strict=True):
                    assert (a.token_ids, a.text, a.logprobs) == (b.token_ids, b.text, b.logprobs)
                    assert (a.finish_reason, a.revision, a.node_id) == (
                        b.finish_reason,
                        b.revision,
                        b.node_id,
                    )
            assert not len(server.node.requests)

    run(test)


def test_leaving_a_multiplexed_answer_cancels_it_alone() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.005)
        async with (
            serving(engine) as (server, _),
            AsyncClient(nodes=[server.address], multiplex=True) as client,
        ):
            other = asyncio.create_task(client.generate([5, 6], params(60)))
            stream = client.stream([5, 6], params(100_000), request_id="left")
            async with contextlib.aclosing(stream):
                async for _ in stream:
                    break
            await until(lambda: "default/left#0" in engine.ended, "the one that was left ends")
            assert len((await other).token_ids) == 60

    run(test)


def test_typed_errors_and_deadlines_come_through() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.02)
        async with serving(engine) as (server, _):
            async with AsyncClient(nodes=[server.address], multiplex=True) as client:
                with pytest.raises(NotFoundError, match="nobody"):
                    await client.generate([5, 6], params(3), adapter="nobody")
                with pytest.raises(LoraServeError) as late:
                    await client.generate([5, 6], params(1000), timeout_s=0.2)
                assert late.value.code == "DEADLINE_EXCEEDED"
                assert len((await client.generate([5, 6], params(3))).token_ids) == 3
            await until(lambda: not len(server.node.requests), "nothing is left")

    run(test)


def test_a_node_that_goes_ends_all_its_answers_with_unavailable() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.02)
        async with AsyncClient(nodes=["127.0.0.1:1"], multiplex=True) as nobody:
            with pytest.raises(UnavailableError):
                await nobody.generate([5, 6], params(3), timeout_s=60)
        async with serving(engine) as (server, _):
            client = AsyncClient(nodes=[server.address], multiplex=True)
            running = [
                asyncio.create_task(client.generate([5, 6], params(10_000))) for _ in range(3)
            ]
            await until(lambda: len(engine.live) == 3, "all run")
            await server.stop()
            ended = await asyncio.gather(*running, return_exceptions=True)
            assert [type(e) for e in ended] == [UnavailableError] * 3
            await client.close()

    run(test)


def test_a_request_id_twice_on_a_client_is_refused_and_strangers_go_on() -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.may_step.clear()
        async with (
            serving(engine) as (server, _),
            AsyncClient(nodes=[server.address], multiplex=True) as client,
        ):
            stranger = asyncio.create_task(client.generate([5, 6], params(60)))
            first = asyncio.create_task(client.generate([5, 6], params(60), request_id="r"))
            await until(lambda: "default/r#0" in engine.live, "it runs")
            with pytest.raises(AlreadyExistsError, match="request_id"):
                await asyncio.wait_for(
                    client.generate([5, 6], params(60), request_id="r", timeout_s=60), 60
                )
            engine.may_step.set()
            assert [len((await t).token_ids) for t in (stranger, first)] == [60, 60]
            # Once it has ended, the name is free again.
            assert len((await client.generate([5, 6], params(3), request_id="r")).token_ids) == 3

    run(test)


def test_a_request_of_any_size_leaves_the_others_alone() -> None:
    """What the client sends is a little larger than what it was given."""

    async def test() -> None:
        engine = FakeEngine(step_s=0.005)
        async with (
            serving(engine) as (server, _),
            AsyncClient(nodes=[server.address], multiplex=True) as client,
        ):
            other = asyncio.create_task(client.generate([5, 6], params(200)))
            await until(lambda: len(engine.live) == 1, "it runs")
            for limit in (MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES):
                for less in (0, 20, 60, 100, 200):
                    with pytest.raises(LoraServeError) as caught:
                        await client.generate("x" * (limit - less), params(3), timeout_s=60)
                    assert caught.value.field in ("prompt", "text")
            assert len((await other).token_ids) == 200

    run(test)


def test_what_a_stream_cannot_carry_is_not_sent() -> None:
    async def test() -> None:
        async with (
            serving(FakeEngine()) as (server, _),
            AsyncClient(nodes=[server.address], multiplex=True) as client,
        ):
            await client.generate([5, 6], params(1))
            mux = client._site.mux
            assert mux is not None
            big = request("big", text="x" * MAX_MESSAGE_BYTES)
            with pytest.raises(InvalidArgumentError, match="prompt"):
                mux.begin(server.address, big, None, lambda load: None)
            assert len((await client.generate([5, 6], params(3))).token_ids) == 3

    run(test)


def test_a_stream_to_a_node_that_has_left_is_closed() -> None:
    async def test() -> None:
        async with (
            serving(FakeEngine()) as (server, _),
            AsyncClient(nodes=[server.address], multiplex=True) as client,
        ):
            await client.generate([5, 6], params(1))
            mux = client._site.mux
            assert mux is not None
            (stream,) = mux._streams.values()
            mux.keep(set())
            assert not mux._streams
            await until(lambda: all(task.done() for task in stream._tasks), "its tasks end")
            assert stream.broken
            assert len((await client.generate([5, 6], params(3))).token_ids) == 3

    run(test)
