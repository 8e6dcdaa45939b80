"""InferenceService and NodeService of a node over real gRPC, with an engine in memory."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_node import BASE, CONTEXT, FakeEngine, blob, read_fake, revision, serving, until
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_health.v1 import (
    health_pb2,
    health_pb2_grpc,
)

from loraserve.errors import LoraServeError
from loraserve.node.limits import Limits
from loraserve.security import Role, create_key
from loraserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc, node_pb2, node_pb2_grpc
from loraserve.v1.inference_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    GenerateRequest,
    TokenIds,
)
from loraserve.wire import bearer_metadata
from loraserve.wire_errors import from_rpc_error


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


def request(request_id: str = "r", **fields: Any) -> GenerateRequest:
    sampling = fields.pop("sampling", {"max_tokens": 3})
    if "text" not in fields:
        fields.setdefault("token_ids", TokenIds(ids=[5, 6]))
    return GenerateRequest(
        request_id=request_id, sampling=common_pb2.SamplingParams(**sampling), **fields
    )


async def answers(channel: grpc.aio.Channel, *args: Any, **fields: Any) -> list[Any]:
    metadata = fields.pop("metadata", ())
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call = stub.Generate(request(*args, **fields), metadata=metadata, timeout=10)
    return [message async for message in call]


async def refused(wait: Awaitable[Any]) -> LoraServeError:
    try:
        await wait
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("was not refused")


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
            assert 7_500_000 <= out[2].usage.queue_time_us < 8_500_000
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
        engine = FakeEngine(step_s=0.2)
        async with serving(engine) as (_, channel):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call = stub.Generate(request())
            header = asyncio.ensure_future(call.initial_metadata())
            await until(lambda: bool(engine.calls), "submitted")
            assert not header.done()
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
            timeout = Duration(nanos=100_000_000)
            error = await refused(answers(channel, timeout=timeout, sampling={"max_tokens": 1000}))
            assert error.code == "DEADLINE_EXCEEDED"
            assert 0 < engine.calls[0]["timeout_s"] <= 0.1
            await until(lambda: not len(server.node.requests), "freed")

    run(test)


def test_a_full_node_says_when_to_come_back() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.05)
        limits = Limits(max_sequences=1, max_queued_requests=1)
        async with serving(engine, limits=limits) as (server, channel):
            first = [asyncio.ensure_future(answers(channel, f"r{i}")) for i in range(2)]
            await until(lambda: len(engine.live) == 2, "running")
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(request("r3")).read()
            error: Any = from_rpc_error(caught.value)
            assert error.code == "RESOURCE_EXHAUSTED"
            assert error.retry_after_s > 0
            assert error_details_pb2.RetryInfo.DESCRIPTOR.full_name in str(caught.value)
            await asyncio.gather(*first)
            assert await answers(channel, "r3")

    run(test)


def test_a_later_attempt_takes_over_and_an_equal_one_is_refused() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.02)
        async with serving(engine) as (server, channel):
            old = asyncio.ensure_future(answers(channel, sampling={"max_tokens": 1000}))
            await until(lambda: len(engine.live) == 1, "running")
            assert (await refused(answers(channel))).code == "ALREADY_EXISTS"
            new = await answers(channel, attempt=1)
            assert new[-1].finish_reason == FINISH_REASON_LENGTH
            assert (await refused(old)).code == "CANCELLED"
            assert not len(server.node.requests)

    run(test)


def test_abort_ends_a_request_with_what_it_has() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.02)
        async with serving(engine) as (_, channel):
            service = node_pb2_grpc.NodeServiceStub(channel)
            running = asyncio.ensure_future(answers(channel, sampling={"max_tokens": 1000}))
            await until(lambda: len(engine.live) == 1, "running")
            await asyncio.sleep(0.1)
            assert (await service.Abort(node_pb2.AbortRequest(request_id="r"))).found
            out = await running
            assert out[-1].finish_reason == FINISH_REASON_CANCELLED
            assert out[-1].usage.completion_tokens == len(out) - 1 > 0
            assert not (await service.Abort(node_pb2.AbortRequest(request_id="r"))).found

    run(test)


def test_tenants_cannot_see_each_other(tmp_path: Path) -> None:
    async def test() -> None:
        keys = tmp_path / "keys"
        key = {
            name: bearer_metadata(create_key(keys, name, name, role))
            for name, role in (("ann", Role.USER), ("bob", Role.USER), ("op", Role.ADMIN))
        }
        engine = FakeEngine(step_s=0.02)
        async with serving(engine, keys=keys, store=_store(tmp_path, "a")) as (_, channel):
            service = node_pb2_grpc.NodeServiceStub(channel)
            load = node_pb2.AdapterLoad(
                adapter={"tenant": "ann", "base": BASE, "name": "sql"}, revision=revision("a")
            )
            denied = await refused(
                service.LoadAdapter(node_pb2.LoadAdapterRequest(load=load), metadata=key["ann"])
            )
            assert denied.code == "PERMISSION_DENIED"
            await service.LoadAdapter(node_pb2.LoadAdapterRequest(load=load), metadata=key["op"])
            sql = {"name": "sql"}
            foreign = await refused(answers(channel, adapter=sql, metadata=key["bob"]))
            absent = await refused(answers(channel, adapter={"name": "s"}, metadata=key["bob"]))
            assert foreign.code == absent.code == "NOT_FOUND"
            assert str(foreign).replace("sql", "s") == str(absent)
            mine = asyncio.ensure_future(
                answers(channel, adapter=sql, sampling={"max_tokens": 99}, metadata=key["ann"])
            )
            await until(lambda: len(engine.live) == 1, "running")
            assert engine.calls[0]["tenant"] == "ann"
            # The same request id is another request for another tenant.
            await answers(channel, sampling={"max_tokens": 1}, metadata=key["bob"])
            abort = node_pb2.AbortRequest(request_id="r")
            assert not (await service.Abort(abort, metadata=key["bob"])).found
            assert (await service.Abort(abort, metadata=key["op"])).found
            assert (await mine)[0].start.revision == revision("a")

    run(test)


def _store(tmp_path: Path, *letters: str) -> Path:
    for letter in letters:
        folder = tmp_path / "store" / (letter * 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{revision(letter)}.lora").write_bytes(blob(letter))
    return tmp_path / "store"


def test_operators_load_list_and_unload(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.02)
        async with serving(engine, store=_store(tmp_path, "a", "b")) as (server, channel):
            service = node_pb2_grpc.NodeServiceStub(channel)
            sql = common_pb2.AdapterId(tenant="default", base=BASE, name="sql")

            def load(letter: str) -> Any:
                wanted = node_pb2.AdapterLoad(adapter=sql, revision=revision(letter))
                return service.LoadAdapter(node_pb2.LoadAdapterRequest(load=wanted))

            held = (await load("a")).residency
            assert [(r.revision, r.state) for r in held] == [
                (revision("a"), common_pb2.RESIDENCY_STATE_HOST)
            ]
            assert held[0].size_bytes == 100
            running = asyncio.ensure_future(
                answers(channel, "old", adapter={"name": "sql"}, sampling={"max_tokens": 1000})
            )
            await until(lambda: len(engine.live) == 1, "running")
            # Another revision comes to stand beside the first and takes the name.
            assert len((await load("b")).residency) == 2
            new = await answers(channel, "new", adapter={"name": "sql"})
            assert new[0].start.revision == revision("b")
            pinned = {"name": "sql", "revision": revision("a")}
            old = await answers(channel, "pinned", adapter=pinned)
            assert old[0].start.revision == revision("a")
            # The old one is drained; its request is ended because it takes too long.
            timeout = Duration(nanos=50_000_000)
            left = await service.UnloadAdapter(
                node_pb2.UnloadAdapterRequest(
                    adapter=sql, revision=revision("a"), drain_timeout=timeout
                )
            )
            assert [r.revision for r in left.residency] == [revision("b")]
            assert (await refused(running)).code == "UNAVAILABLE"
            assert [name[-2:] for name in engine.unloaded] == ["#1"]
            gone = await refused(answers(channel, "gone", adapter=pinned))
            assert gone.code == "NOT_FOUND"
            assert (await refused(load("c"))).code == "NOT_FOUND"
            states = {
                r.revision[0]: r.state
                for r in (await service.ListResidency(node_pb2.ListResidencyRequest())).residency
            }
            assert states == {
                "b": common_pb2.RESIDENCY_STATE_HOST,
                "c": common_pb2.RESIDENCY_STATE_FAILED,
            }
            info = await service.GetNodeInfo(node_pb2.GetNodeInfoRequest())
            assert (info.node_id, info.limits.context_tokens) == ("n1", CONTEXT)
            assert info.incarnation == server.node.incarnation > 0

    run(test)


def test_a_draining_node_takes_nothing_and_says_so() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.02)
        async with serving(engine) as (_, channel):
            service = node_pb2_grpc.NodeServiceStub(channel)
            health = health_pb2_grpc.HealthStub(channel)

            async def status() -> Any:
                name = "loraserve.v1.InferenceService"
                return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

            assert await status() == health_pb2.HealthCheckResponse.SERVING
            running = asyncio.ensure_future(answers(channel, sampling={"max_tokens": 1000}))
            await until(lambda: len(engine.live) == 1, "running")
            draining = asyncio.ensure_future(
                service.Drain(node_pb2.DrainRequest(timeout=Duration(nanos=200_000_000)))
            )
            await asyncio.sleep(0.05)
            assert (await refused(answers(channel, "late"))).code == "UNAVAILABLE"
            assert await status() == health_pb2.HealthCheckResponse.NOT_SERVING
            assert (await draining).ended_requests == 1
            assert (await refused(running)).code == "UNAVAILABLE"

    run(test)


def test_step_stream_is_not_offered_yet() -> None:
    async def test() -> None:
        async with serving(FakeEngine()) as (_, channel):
            call = inference_pb2_grpc.InferenceServiceStub(channel).StepStream()
            await call.write(inference_pb2.StepStreamRequest())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED

    run(test)


def test_the_node_refuses_until_its_model_is_there() -> None:
    async def test() -> None:
        import threading

        from fake_node import FACTS

        from loraserve.node.engine_api import LoadedModel
        from loraserve.node.server import NodeOptions, NodeServer
        from loraserve.wire import dial

        may_open = threading.Event()

        def slow() -> LoadedModel:
            assert may_open.wait(10)
            return LoadedModel(FakeEngine(), FACTS)

        server = NodeServer(NodeOptions("n1", BASE), slow, read_fake)
        starting = asyncio.ensure_future(server.start())
        try:
            await until(lambda: bool(server.address), "listening")
            async with dial(server.address) as channel:
                assert (await refused(answers(channel))).code == "UNAVAILABLE"
                check = health_pb2_grpc.HealthStub(channel).Check
                status = (await check(health_pb2.HealthCheckRequest())).status
                assert status == health_pb2.HealthCheckResponse.NOT_SERVING
                may_open.set()
                await starting
                assert await answers(channel)
        finally:
            may_open.set()
            await starting
            await server.stop()

    run(test)
