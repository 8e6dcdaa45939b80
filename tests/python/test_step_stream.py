"""StepStream over real gRPC: the answers are those of Generate, and no request holds another up."""

from typing import Any

import grpc
import grpc.aio
import pytest
from fake_node import BASE, FakeEngine, until
from node_calls import answers, refused, request, run
from step_streams import stream_to

from loraserve.errors import (
    InvalidArgumentError,
    StaleRouteError,
)
from loraserve.node import lane as lane_module
from loraserve.node import step_stream
from loraserve.node.lane import START_CREDIT
from loraserve.node.limits import Limits
from loraserve.v1.inference_pb2 import StepStreamRequest
from loraserve.wire_errors import from_detail, to_detail


@pytest.fixture(params=[False, True], ids=["tasks", "lanes"])
def lanes(request: pytest.FixtureRequest) -> bool:
    """Both ways in which a node serves the requests of a stream."""
    return bool(request.param)


def test_an_answer_is_that_of_generate_but_for_times() -> None:
    async def test() -> None:
        async with stream_to(FakeEngine()) as (_, channel, stream):
            sampling = {"max_tokens": 3, "seed": 11, "logprobs": 2}
            wanted = await answers(channel, attempt=2, sampling=sampling)
            await stream.submit("r", attempt=2, sampling=sampling)
            await stream.call.done_writing()
            while await stream.read():
                pass
            assert await stream.call.code() is grpc.StatusCode.OK
            assert any(m.HasField("load") for m in stream.messages)
            got = stream.outputs["r"]
            assert len(got) == len(wanted) == 3
            for output, response in zip(got, wanted, strict=True):
                for message in (output, response):
                    for part in ("start", "usage"):
                        if message.HasField(part):
                            getattr(message, part).queue_time_us = 0
                    if message.HasField("start"):
                        message.start.prefill_time_us = 0
                for field in response.DESCRIPTOR.fields:
                    if field.name != "load":
                        assert getattr(output, field.name) == getattr(response, field.name)

    run(test)


def test_what_a_step_brings_comes_in_one_message(lanes: bool) -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.may_step.clear()
        async with stream_to(engine, lanes) as (_, _, stream):
            names = [f"r{i}" for i in range(20)]
            for name in names:
                await stream.submit(name, sampling={"max_tokens": 5})
            await until(lambda: len(engine.live) == 20, "all run")
            engine.may_step.set()
            await stream.read_until_ended(*names)
            assert all(stream.tokens(name) == [2, 3, 4, 5, 6] for name in names)
            # 100 outputs of five steps that all take at once.
            assert len(stream.messages) <= 60

    run(test)


def test_a_request_that_fails_leaves_the_others_alone(lanes: bool) -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.01)
        async with stream_to(engine, lanes) as (_, _, stream):
            await stream.submit("good", sampling={"max_tokens": 20})
            await stream.submit("bad", token_ids={"ids": []})
            await stream.submit("stranger", adapter={"base": "other"})
            await stream.submit("", sampling={"max_tokens": 3})
            await stream.read_until_ended("good", "bad", "stranger", "")
            assert len(stream.tokens("good")) == 20
            assert isinstance(stream.error("bad"), InvalidArgumentError)
            assert stream.error("bad").field == "token_ids"
            assert stream.error("stranger").field == "base"
            assert stream.error("").field == "request_id"

    run(test)


def test_an_adapter_that_moved_is_told_with_its_holders(lanes: bool) -> None:
    async def test() -> None:
        async with stream_to(FakeEngine(), lanes) as (server, _, stream):
            adapter = {"base": BASE, "name": "sql", "revision": "a" * 64}
            await stream.submit("r", adapter=adapter, routes={"epoch": 3, "version": 4})
            await stream.read_until_ended("r")
            error = stream.error("r")
            assert isinstance(error, StaleRouteError)
            assert not len(server.node.requests)

    run(test)


def test_a_stale_route_survives_the_detail() -> None:
    error = StaleRouteError("adapter", "is not here", ("n2", "n3"), (3, 4))
    back = from_detail(to_detail(error))
    assert isinstance(back, StaleRouteError)
    assert (back.holders, back.version, str(back)) == (("n2", "n3"), (3, 4), str(error))


def test_without_credit_a_request_is_held_back_and_others_go_on(lanes: bool) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with stream_to(engine, lanes) as (_, _, stream):
            await stream.submit("slow", sampling={"max_tokens": START_CREDIT + 50})
            while len(stream.tokens("slow")) < START_CREDIT:
                assert await stream.read()
            await stream.submit("other", sampling={"max_tokens": 30})
            await stream.read_until_ended("other")
            assert len(stream.tokens("slow")) == START_CREDIT
            await stream.credit("slow", 50)
            await stream.read_until_ended("slow")
            assert stream.tokens("slow") == list(range(2, START_CREDIT + 52))

    run(test)


def test_a_request_that_gets_no_credit_is_ended(lanes: bool) -> None:
    async def test() -> None:
        # It bounds each write as well: not so short that a busy machine is taken for a reader
        # who has stopped.
        limits = Limits(stall_timeout_s=3.0)
        async with stream_to(FakeEngine(), lanes, limits=limits) as (server, _, stream):
            await stream.submit("slow", sampling={"max_tokens": START_CREDIT + 50})
            await stream.read_until_ended("slow")
            assert stream.error("slow").field == "stall_timeout_s"
            await until(lambda: not len(server.node.requests), "the request ends")
            await stream.submit("next")
            await stream.read_until_ended("next")
            assert stream.tokens("next") == [2, 3, 4]

    run(test)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_what_waits_for_credit_is_bounded(
    monkeypatch: pytest.MonkeyPatch, logprobs: int | None
) -> None:
    monkeypatch.setattr(lane_module, "MAX_BACKLOG", 300)

    async def test() -> None:
        engine = FakeEngine()
        async with stream_to(engine, lanes=True) as (server, _, stream):
            sampling = {"max_tokens": 1_000_000} | ({"logprobs": logprobs} if logprobs else {})
            await stream.submit("slow", sampling=sampling)
            await stream.read_until_ended("slow")
            assert stream.error("slow").field == "credit"
            assert len(stream.tokens("slow")) == START_CREDIT
            await until(lambda: not engine.live, "the engine's request ends")
            assert not len(server.node.requests)

    run(test)


def test_cancel_frees_the_request_at_once(lanes: bool) -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.01)
        async with stream_to(engine, lanes) as (server, _, stream):
            await stream.submit("r", sampling={"max_tokens": 100_000})
            await stream.read()
            await stream.cancel("unknown")
            await stream.cancel("r")
            await until(lambda: engine.ended == ["default/r#0"], "the engine's request ends")
            assert not len(server.node.requests)
            await stream.submit("r", attempt=1)
            await stream.read_until_ended("r")
            assert stream.tokens("r")[-3:] == [2, 3, 4]

    run(test)


def test_the_end_of_the_stream_ends_its_requests(lanes: bool) -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.01)
        async with stream_to(engine, lanes) as (server, _, stream):
            for name in ("a", "b"):
                await stream.submit(name, sampling={"max_tokens": 100_000})
            await until(lambda: len(engine.live) == 2, "both run")
            stream.call.cancel()
            await until(lambda: len(engine.ended) == 2, "both end")
            await until(lambda: not len(server.node.requests), "nothing is left")

    run(test)


def test_a_stream_without_sense_ends_with_a_typed_error() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.01)
        async with stream_to(engine) as (server, _, stream):
            await stream.submit("r", sampling={"max_tokens": 100_000})
            await until(lambda: len(engine.live) == 1, "it runs")
            await stream.call.write(StepStreamRequest())

            async def drain() -> None:
                while await stream.read():
                    pass
                raise AssertionError("the stream went on")

            error = await refused(drain())
            assert isinstance(error, InvalidArgumentError)
            assert error.field == "action"
            await until(lambda: not len(server.node.requests), "nothing is left")

    run(test)


def test_a_request_id_that_is_in_use_is_refused_alone(lanes: bool) -> None:
    async def test() -> None:
        async with stream_to(FakeEngine(step_s=0.01), lanes) as (_, _, stream):
            await stream.submit("other", sampling={"max_tokens": 30})
            await stream.submit("r", sampling={"max_tokens": 100_000})
            await stream.submit("r")
            await stream.read_until_ended("other")
            assert len(stream.tokens("other")) == 30
            refused = [o for o in stream.outputs["r"] if o.HasField("error")]
            assert [from_detail(o.error).code for o in refused] == ["ALREADY_EXISTS"]

    run(test)


def test_more_requests_than_a_stream_may_have_are_refused_one_by_one(lanes: bool) -> None:
    async def test() -> None:
        engine, limits = FakeEngine(), Limits(max_sequences=2, max_queued_requests=0)
        engine.may_step.clear()
        async with stream_to(engine, lanes, limits=limits) as (_, _, stream):
            names = [f"r{i}" for i in range(9)]
            for name in names:
                await stream.submit(name, sampling={"max_tokens": 20})
            while sum(map(stream.ended, names)) < 7:
                assert await stream.read()
            engine.may_step.set()
            await stream.read_until_ended(*names)
            done = [n for n in names if stream.outputs[n][-1].finish_reason]
            assert len(done) == 2
            for name in set(names) - set(done):
                assert stream.error(name).code == "RESOURCE_EXHAUSTED"

    run(test)


def test_outputs_over_the_bound_of_a_message_come_in_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_stream, "MAX_PART_BYTES", 60)

    async def test() -> None:
        async with stream_to(FakeEngine(step_s=0.05)) as (_, _, stream):
            names = [f"r{i}" for i in range(10)]
            for name in names:
                await stream.submit(name)
            await stream.read_until_ended(*names)
            assert all(stream.tokens(name) == [2, 3, 4] for name in names)
            for message in stream.messages:
                assert len(message.outputs) == 1 or message.ByteSize() < 60 + 200

    run(test)


def test_most_tokens_of_lanes_come_without_an_output_of_their_own() -> None:
    async def test() -> None:
        async with stream_to(FakeEngine(step_s=0.001), lanes=True) as (server, channel, stream):
            await stream.submit("a", sampling={"max_tokens": 50, "seed": 3})
            await stream.submit("b", sampling={"max_tokens": 5, "seed": 3, "logprobs": 1})
            await stream.read_until_ended("a", "b")
            assert stream.tokens("a") == list(range(2, 52))
            assert stream.tokens("b") == [2, 3, 4, 5, 6]
            told = [o for m in stream.messages for o in m.outputs if o.request_id == "a"]
            assert len(told) == 2
            assert (told[0].HasField("start"), told[1].HasField("usage")) == (True, True)
            assert told[1].first_index == 49
            assert told[1].usage.completion_tokens == 50
            outputs = [o for m in stream.messages for o in m.outputs]
            assert all(not output.text for output in outputs)
            assert [len(o.logprobs) for o in outputs if o.request_id == "b"] == [1] * 5
            # The same is counted as of any other answer.
            series = server.metrics.registry.get_sample_value
            assert series("loraserve_tokens_total", {"kind": "generated"}) == 55
            assert series("loraserve_tbt_seconds_count") == 53
            assert series("loraserve_ttft_seconds_count") == 2
            generated = await answers(channel, sampling={"max_tokens": 50}, omit_text=True)
            assert [t for m in generated for t in m.token_ids] == stream.tokens("a")
            assert not any(message.text for message in generated)

    run(test)


def test_tokens_and_outputs_that_wait_for_credit_keep_their_order() -> None:
    """Some come alone, some with log-probabilities, as an engine may mix them."""

    class Mixed(FakeEngine):
        def submit(self, prompt: Any, params: Any = None, adapter: Any = None, **more: Any) -> Any:
            stream = super().submit(prompt, params, adapter, **more)
            chunks = stream.chunks

            async def mixed() -> Any:
                async for chunk in chunks():
                    if chunk.first_index % 3 == 1:
                        chunk.logprobs = [-1.0]
                    yield chunk

            stream.chunks = mixed
            return stream

    async def test() -> None:
        async with stream_to(Mixed(), lanes=True) as (_, _, stream):
            await stream.submit("r", sampling={"max_tokens": START_CREDIT + 100})
            while len(stream.tokens("r")) < START_CREDIT:
                assert await stream.read()
            for _ in range(20):
                await stream.credit("r", 7)
            await stream.read_until_ended("r")
            assert stream.tokens("r") == list(range(2, START_CREDIT + 102))

    run(test)


@pytest.mark.parametrize(
    ("fields", "lane", "field"),
    [
        ({"omit_text": True}, 1, "lane"),
        ({}, 2, "lane"),
        ({"omit_text": True, "sampling": {"stop": ["x"]}}, 2, "stop"),
    ],
)
def test_lanes_that_cannot_be(fields: dict[str, Any], lane: int, field: str) -> None:
    async def test() -> None:
        async with stream_to(FakeEngine(step_s=0.01), lanes=True) as (server, _, stream):
            await stream.submit("first", sampling={"max_tokens": 100_000})
            submit = request("second", **fields)
            await stream.call.write(StepStreamRequest(submit=submit, lane=lane))
            if field == "stop":
                await stream.read_until_ended("second")
                assert stream.error("second").field == "stop"
                return

            async def drain() -> None:
                while await stream.read():
                    pass

            error = await refused(drain())
            assert (error.code, error.field) == ("INVALID_ARGUMENT", field)
            await until(lambda: not len(server.node.requests), "nothing is left")

    run(test)
