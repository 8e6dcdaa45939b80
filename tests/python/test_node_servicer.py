"""InferenceService and NodeService of a node over real gRPC, with an engine in memory."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_node import BASE, CONTEXT, FakeEngine, serving, until
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from node_calls import answers, generate, refused, request, run

from loraserve.node.limits import Limits
from loraserve.v1 import inference_pb2_grpc
from loraserve.v1.inference_pb2 import FINISH_REASON_LENGTH, TokenIds
from loraserve.wire_errors import DETAILS_KEY, from_rpc_error


def test_an_answer_from_first_to_last_message() -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.queue_s = 7.5
        async with serving(engine) as (server, channel):
            out = await answers(
                channel, attempt=2, sampling={"max_tokens": 3, "seed": 11, "logprobs": 2}
            )
            assert [m.first_index for m in out] == [0, 1, 2]
            assert [list(m.token_ids) for m in out] == [[2], [3], [4]]
            assert "".join(m.text for m in out) == "<2><3><4>"
            assert {(m.request_id, m.attempt) for m in out} == {("r", 2)}
            assert [t.token_id for t in out[0].logprobs[0].top] == [2, 9, 7]
            start = out[0].start
            assert (start.seed, start.node_id, start.prompt_tokens) == (11, "n1", 2)
            assert (start.base.name, start.revision, start.cached_prompt_tokens) == (BASE, "", 3)
            assert not out[1].HasField("start")
            assert out[0].load.total_pages == 100
            assert out[2].finish_reason == FINISH_REASON_LENGTH
            assert out[2].usage.completion_tokens == 3
            # What the engine says, and the little that it took to get there.
            assert 7_500_000 <= out[2].usage.queue_time_us < 60_000_000
            assert not len(server.node.requests)
            value = server.metrics.registry.get_sample_value
            assert value("loraserve_requests_total", {"code": "OK"}) == 1
            assert value("loraserve_ttft_seconds_count") == 1
            assert value("loraserve_tbt_seconds_count") == 2
            assert value("loraserve_tokens_total", {"kind": "generated"}) == 3
            assert value("loraserve_pages", {"use": "kv"}) == 8

    run(test)


def test_absent_sampling_fields_are_the_defaults_and_a_seed_is_drawn() -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with serving(engine) as (_, channel):
            out = await answers(channel, text="ab", sampling={})
            params = engine.calls[0]["params"]
            assert (params.max_tokens, params.temperature, params.logprobs) == (16, 1.0, None)
            assert params.seed == out[0].start.seed != 0
            await answers(channel, sampling={"temperature": 0.0, "stop": ["x"], "top_k": 0})
            params = engine.calls[1]["params"]
            assert (params.temperature, params.stop) == (0.0, ("x",))
            assert engine.calls[0]["prompt"] == [97, 98]

    run(test)


def test_a_resumed_request_goes_on_where_it_was() -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with serving(engine) as (_, channel):
            out = await answers(
                channel,
                attempt=1,
                start_index=2,
                emitted_token_ids=[40, 41],
                sampling={"max_tokens": 5, "min_tokens": 1, "seed": 3},
            )
            call = engine.calls[0]
            assert call["prompt"] == [5, 6, 40, 41]
            assert (call["start_index"], call["params"].max_tokens) == (2, 3)
            assert [m.first_index for m in out] == [2, 3, 4]
            assert out[-1].usage.completion_tokens == 5
            assert out[0].start.prompt_tokens == 2

    run(test)


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"request_id": ""}, "INVALID_ARGUMENT", "request_id"),
        ({"request_id": "x" * 129}, "INVALID_ARGUMENT", "request_id"),
        ({"start_index": 1}, "INVALID_ARGUMENT", "start_index"),
        ({"text": ""}, "INVALID_ARGUMENT", "text"),
        ({"text": "é" * 600}, "INVALID_ARGUMENT", "text"),
        ({"token_ids": TokenIds()}, "INVALID_ARGUMENT", "token_ids"),
        ({"token_ids": TokenIds(ids=[1] * CONTEXT)}, "INVALID_ARGUMENT", "token_ids"),
        ({"token_ids": None}, "INVALID_ARGUMENT", "prompt"),
        ({"sampling": {"max_tokens": 0}}, "INVALID_ARGUMENT", "max_tokens"),
        ({"sampling": {"max_tokens": 2**32 - 1}}, "INVALID_ARGUMENT", "max_tokens"),
        ({"sampling": {"min_tokens": 17}}, "INVALID_ARGUMENT", "min_tokens"),
        ({"sampling": {"temperature": float("nan")}}, "INVALID_ARGUMENT", "temperature"),
        ({"sampling": {"presence_penalty": 2.5}}, "INVALID_ARGUMENT", "presence_penalty"),
        ({"sampling": {"stop": [""]}}, "INVALID_ARGUMENT", "stop"),
        ({"sampling": {"stop": ["a"] * 17}}, "INVALID_ARGUMENT", "stop"),
        (
            {"start_index": 2, "emitted_token_ids": [1, 2], "sampling": {"max_tokens": 2}},
            "INVALID_ARGUMENT",
            "start_index",
        ),
        ({"timeout": Duration()}, "DEADLINE_EXCEEDED", "timeout"),
        ({"adapter": {"base": "other"}}, "FAILED_PRECONDITION", "base"),
        ({"adapter": {"name": "../x"}}, "INVALID_ARGUMENT", "adapter.name"),
        ({"adapter": {"name": "a", "revision": "z"}}, "INVALID_ARGUMENT", "adapter.revision"),
        ({"adapter": {"name": "nobody"}}, "NOT_FOUND", "adapter"),
    ],
)
def test_wrong_requests_are_refused_by_field(fields: dict[str, Any], code: str, field: str) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with serving(engine, limits=Limits(max_prompt_bytes=1000)) as (server, channel):
            given = dict(fields)
            error = await refused(answers(channel, given.pop("request_id", "r"), **given))
            assert (error.code, error.field) == (code, field)
            assert not engine.calls
            assert not len(server.node.requests)
            sample = server.metrics.registry.get_sample_value
            assert sample("loraserve_requests_total", {"code": code}) == 1

    run(test)


def test_no_header_comes_before_the_first_token() -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.may_step.clear()
        async with serving(engine) as (_, channel):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.Generate(request())
            header = asyncio.ensure_future(call.initial_metadata())
            await until(lambda: bool(engine.calls), "submitted")
            # A header would have come before this answer.
            await refused(answers(channel, "other", token_ids=TokenIds()))
            assert not header.done()
            engine.may_step.set()
            await call.read()
            await header
            call.cancel()

    run(test)


def test_a_cancelled_call_frees_what_it_holds() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.01)
        async with serving(engine) as (server, channel):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.Generate(request(sampling={"max_tokens": 10000}))
            await call.read()
            assert len(engine.live) == 1
            call.cancel()
            await until(lambda: not engine.live and not len(server.node.requests), "freed")
            value = server.metrics.registry.get_sample_value
            assert value("loraserve_requests_total", {"code": "CANCELLED"}) == 1

    run(test)


def test_the_sooner_deadline_holds() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.01)
        async with serving(engine) as (server, channel):
            endless = {"max_tokens": 100_000}
            for most_s, rpc_s in ((1000, 50), (50, 1000)):
                call = generate(
                    channel, timeout=Duration(seconds=most_s), rpc_timeout=rpc_s, sampling=endless
                )
                await call.read()
                # gRPC tells a little more than was left.
                assert 0 < engine.calls[-1]["timeout_s"] <= 60
                call.cancel()
                await until(lambda: not len(server.node.requests), "freed")
            for deadline in ({"timeout": Duration(nanos=100_000_000)}, {"rpc_timeout": 0.1}):
                error = await refused(answers(channel, sampling=endless, **deadline))
                assert error.code == "DEADLINE_EXCEEDED"
                await until(lambda: not len(server.node.requests), "freed")

    run(test)


def test_a_full_node_says_when_to_come_back() -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.may_step.clear()
        limits = Limits(max_sequences=1, max_queued_requests=1)
        async with serving(engine, limits=limits) as (_, channel):
            first = [asyncio.ensure_future(answers(channel, f"r{i}")) for i in range(2)]
            await until(lambda: len(engine.live) == 2, "running")
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(request("r3")).read()
            error: Any = from_rpc_error(caught.value)
            assert error.code == "RESOURCE_EXHAUSTED"
            assert error.retry_after_s > 0
            status = status_pb2.Status.FromString(
                dict(caught.value.trailing_metadata())[DETAILS_KEY]
            )
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            assert status.details[0].Unpack(info)
            assert (info.reason, info.domain) == ("RESOURCE_EXHAUSTED", "loraserve")
            assert info.metadata["field"] == "requests"
            assert status.details[1].Unpack(retry)
            engine.may_step.set()
            await asyncio.gather(*first)
            assert await answers(channel, "r3")

    run(test)


def test_a_later_attempt_takes_over_and_an_equal_one_is_refused() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.02)
        async with serving(engine) as (server, channel):
            old = asyncio.ensure_future(answers(channel, sampling={"max_tokens": 100_000}))
            await until(lambda: len(engine.live) == 1, "running")
            assert (await refused(answers(channel))).code == "ALREADY_EXISTS"
            new = await answers(channel, attempt=1)
            assert new[-1].finish_reason == FINISH_REASON_LENGTH
            assert (await refused(old)).code == "CANCELLED"
            assert not len(server.node.requests)

    run(test)


def test_attempt_after_attempt_is_bounded_like_any_request() -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.may_step.clear()  # what is replaced takes a step to end
        limits = Limits(max_sequences=1, max_queued_requests=1)
        async with serving(engine, limits=limits) as (server, channel):
            calls = [asyncio.ensure_future(answers(channel, attempt=0))]
            await until(lambda: len(engine.calls) == 1, "running")
            for attempt in (1, 2):
                calls.append(asyncio.ensure_future(answers(channel, attempt=attempt)))
                await until(lambda: len(engine.calls) == len(calls), "running")
            error = await refused(answers(channel, attempt=3))
            assert (error.code, error.field) == ("RESOURCE_EXHAUSTED", "requests")
            engine.may_step.set()
            assert len(await calls[2]) == 3
            for call in calls[:2]:
                assert (await refused(call)).code == "CANCELLED"
            assert not len(server.node.requests)

    run(test)
