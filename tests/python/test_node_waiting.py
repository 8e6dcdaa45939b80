"""Requests that wait: for their adapter, or for a client that does not read."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from fake_node import FakeEngine, FakeStream, load_of, serving, until
from google.protobuf.duration_pb2 import Duration
from node_calls import answers, generate, node_service, refused, run, store_with

from loraserve.errors import InvalidCheckpointError
from loraserve.node import requests
from loraserve.node.limits import Limits
from loraserve.node.server import NodeServer
from loraserve.security import Role, create_key
from loraserve.v1 import common_pb2, node_pb2
from loraserve.wire import SERVER_OPTIONS, bearer_metadata

SQL = {"name": "sql"}


def waiting_for_sql(server: NodeServer, count: int) -> bool:
    return [r.active_requests for r in server.node.adapters.residency()] == [count]


async def begin_slow_load(server: NodeServer, engine: FakeEngine) -> None:
    """`sql` is on its way until `engine.may_load` is set."""
    engine.may_load.clear()
    held = server.node.adapters.begin_load(load_of("sql", "a"), placed=True)
    await until(lambda: held.installing, "installing")


def test_a_request_leaves_the_queue_of_its_adapter_when_its_time_is_over(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with serving(engine, store_with(tmp_path, "a")) as (server, channel):
            await begin_slow_load(server, engine)
            patient = asyncio.ensure_future(answers(channel, "patient", adapter=SQL))
            short = Duration(nanos=50_000_000)
            late = await refused(answers(channel, "short", adapter=SQL, timeout=short))
            assert (late.code, late.field) == ("DEADLINE_EXCEEDED", "deadline")
            late = await refused(answers(channel, "rpc", adapter=SQL, rpc_timeout=0.05))
            assert late.code == "DEADLINE_EXCEEDED"
            await until(lambda: waiting_for_sql(server, 1), "only the patient one is left")
            assert await answers(channel, "other")  # without an adapter: goes on
            engine.may_load.set()
            assert len(await patient) == 3
            assert waiting_for_sql(server, 0)
            assert not len(server.node.requests)

    run(test)


def test_only_what_the_engine_has_waits_for_it(tmp_path: Path) -> None:
    """A node that waits for bytes has no strain on its engine."""

    async def test() -> None:
        engine = FakeEngine(step_s=3600.0)
        async with serving(engine, store_with(tmp_path, "a")) as (server, channel):
            queued = generate(channel, "queued")
            await until(lambda: len(engine.calls) == 1, "in the engine")
            tokens = len(engine.calls[0]["prompt"])
            assert server.node.requests.queued_prefill_tokens == tokens > 0
            await begin_slow_load(server, engine)
            waiting = generate(channel, "waiting", adapter=SQL)
            await until(lambda: waiting_for_sql(server, 1), "waits for its adapter")
            assert server.node.requests.queued_prefill_tokens == tokens
            assert len(server.node.requests) == 2
            engine.may_load.set()
            await until(lambda: len(engine.calls) == 2, "both in the engine")
            assert server.node.requests.queued_prefill_tokens == 2 * tokens
            for call in (queued, waiting):
                call.cancel()
            await until(lambda: not len(server.node.requests), "gone")
            assert server.node.requests.queued_prefill_tokens == 0

    run(test)


def test_a_request_that_waits_for_its_adapter_can_be_ended(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with serving(engine, store_with(tmp_path, "a")) as (server, channel):
            await begin_slow_load(server, engine)
            service = node_service(channel)
            aborted = asyncio.ensure_future(answers(channel, "aborted", adapter=SQL))
            replaced = asyncio.ensure_future(answers(channel, "r", adapter=SQL))
            cancelled = generate(channel, "cancelled", adapter=SQL)
            reading = asyncio.ensure_future(cancelled.read())
            await until(lambda: waiting_for_sql(server, 3), "all wait")
            assert (await service.Abort(node_pb2.AbortRequest(request_id="aborted"))).found
            assert (await refused(aborted)).code == "CANCELLED"
            later = asyncio.ensure_future(answers(channel, "r", attempt=1, adapter=SQL))
            error = await refused(replaced)
            assert (error.code, error.field) == ("CANCELLED", "attempt")
            cancelled.cancel()
            await asyncio.wait({reading})
            await until(lambda: waiting_for_sql(server, 1), "only the later attempt is left")
            engine.may_load.set()
            assert len(await later) == 3
            assert [call["request_id"] for call in engine.calls] == ["default/r#1"]

    run(test)


def test_the_queue_of_an_adapter_is_bounded(tmp_path: Path) -> None:
    async def test() -> None:
        engine, limits = FakeEngine(), Limits(max_waiting_per_adapter=2)
        async with serving(engine, store_with(tmp_path, "a"), limits) as (server, channel):
            await begin_slow_load(server, engine)
            waiting = [asyncio.ensure_future(answers(channel, f"r{i}", adapter=SQL)) for i in "01"]
            await until(lambda: waiting_for_sql(server, 2), "all wait")
            error: Any = await refused(answers(channel, "r2", adapter=SQL))
            assert (error.code, error.field) == ("RESOURCE_EXHAUSTED", "adapter")
            assert error.retry_after_s > 0
            assert await answers(channel, "other")
            engine.may_load.set()
            assert [len(out) for out in await asyncio.gather(*waiting)] == [3, 3]

    run(test)


def test_all_who_wait_for_a_load_that_fails_are_told_why(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with serving(engine, store_with(tmp_path, "a")) as (server, channel):
            await begin_slow_load(server, engine)
            waiting = [
                asyncio.ensure_future(refused(answers(channel, i, adapter=SQL))) for i in "ab"
            ]
            await until(lambda: waiting_for_sql(server, 2), "all wait")
            engine.load_error = InvalidCheckpointError("q_proj", "has another shape")
            engine.may_load.set()
            for error in await asyncio.gather(*waiting):
                assert (error.code, error.field) == ("FAILED_PRECONDITION", "adapter")
                assert "q_proj: has another shape" in error.message
            (shown,) = server.node.adapters.residency()
            assert shown.state == common_pb2.RESIDENCY_STATE_FAILED
            assert (shown.error.field, shown.active_requests) == ("q_proj", 0)

    run(test)


class Wordy(FakeEngine):
    """Each token is so long that few fit between a node and a client that does not read."""

    def submit(self, *args: Any, **more: Any) -> Any:
        stream: FakeStream = super().submit(*args, **more)
        chunks = stream.chunks

        async def wordy() -> Any:
            async for chunk in chunks():
                chunk.text = "x" * 100_000
                yield chunk

        stream.chunks = wordy  # type: ignore[method-assign]
        return stream


@pytest.mark.parametrize("end", ["unload", "deadline", "abort", "replace"])
def test_a_client_that_does_not_read_holds_nothing_for_ever(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "STALLED_S", 0.1)

    async def test() -> None:
        engine = Wordy()
        async with serving(engine, store_with(tmp_path, "a")) as (server, channel):
            held = server.node.adapters.begin_load(load_of("sql", "a"), placed=True)
            await held.settled.wait()
            # A deadline that leaves a busy machine the time for the first message.
            more = {"timeout": Duration(seconds=3)} if end == "deadline" else {}
            call = generate(channel, adapter=SQL, sampling={"max_tokens": 100_000}, **more)
            await call.read()
            if end != "deadline":
                await asyncio.sleep(0.3)  # the window is full
                assert waiting_for_sql(server, 1)
            service = node_service(channel)
            match end:
                case "unload":
                    await asyncio.wait_for(
                        service.UnloadAdapter(
                            node_pb2.UnloadAdapterRequest(
                                adapter=common_pb2.AdapterId(tenant="default", name="sql"),
                                drain_timeout=Duration(nanos=1),
                            )
                        ),
                        60,
                    )
                    assert engine.loaded == {}
                case "abort":
                    assert (await service.Abort(node_pb2.AbortRequest(request_id="r"))).found
                case "replace":
                    assert len(await answers(channel, attempt=1)) == 3
            await until(lambda: not len(server.node.requests), "ended")
            await until(lambda: not engine.live, "the engine is rid of it")
            assert not any(r.active_requests for r in server.node.adapters.residency())
            call.cancel()

    run(test)


def test_a_client_that_reads_nothing_is_cut_off(tmp_path: Path) -> None:
    async def test() -> None:
        engine, limits = Wordy(), Limits(stall_timeout_s=0.3)
        async with serving(engine, store_with(tmp_path, "a"), limits) as (server, channel):
            held = server.node.adapters.begin_load(load_of("sql", "a"), placed=True)
            await held.settled.wait()
            call = generate(channel, adapter=SQL, sampling={"max_tokens": 100_000})
            await until(lambda: len(engine.calls) == 1, "runs")
            await until(lambda: not len(server.node.requests) and not engine.live, "freed")
            assert waiting_for_sql(server, 0)
            # Whoever reads after all learns why the answer ends.
            error = await refused(_rest(call))
            assert (error.code, error.field) == ("RESOURCE_EXHAUSTED", "stall_timeout_s")
            assert "read nothing of its answer for 0.3 s" in error.message

    run(test)


def test_a_client_that_reads_slowly_but_steadily_is_not_cut_off() -> None:
    async def test() -> None:
        limits = Limits(stall_timeout_s=3.0)
        async with serving(Wordy(), limits=limits) as (_, channel):
            begin = asyncio.get_running_loop().time()
            slow = generate(channel, "slow", sampling={"max_tokens": 12})
            while (message := await slow.read()) is not grpc.aio.EOF:
                last = message
                await asyncio.sleep(0.3)
            assert last.usage.completion_tokens == 12
            assert asyncio.get_running_loop().time() - begin > limits.stall_timeout_s

    run(test)


async def _rest(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def test_one_tenant_cannot_take_every_slot(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    hog, other = (bearer_metadata(create_key(keys, t, t, Role.USER)) for t in ("hog", "other"))

    async def test() -> None:
        engine = FakeEngine(step_s=0.01)
        limits = Limits(max_sequences=4, max_queued_requests=4)
        async with serving(engine, limits=limits, keys=keys) as (server, channel):
            endless = {"max_tokens": 100_000}
            calls = [generate(channel, f"r{i}", sampling=endless, metadata=hog) for i in range(7)]
            await until(lambda: len(server.node.requests) == 7, "all run")
            error: Any = await refused(answers(channel, "more", metadata=hog))
            assert (error.code, error.field) == ("RESOURCE_EXHAUSTED", "requests")
            assert "7 requests of tenant 'hog'" in error.message
            assert error.retry_after_s > 0
            assert len(await answers(channel, "r", metadata=other)) == 3
            # A later attempt takes the place of the one that it replaces.
            calls.append(generate(channel, "r0", attempt=1, sampling=endless, metadata=hog))
            assert (await calls[-1].read()).token_ids
            calls.pop(1).cancel()
            await until(lambda: len(server.node.requests) == 6, "one is gone")
            assert len(await answers(channel, "again", metadata=hog)) == 3
            for call in calls:
                call.cancel()
            await until(lambda: not len(server.node.requests), "all are gone")

    run(test)


CLIENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from node_calls import generate
from loraserve.wire import dial

async def read():
    async with dial(sys.argv[1]) as channel:
        async for message in generate(channel, sampling={"max_tokens": 100000}, rpc_timeout=60):
            print(message.first_index, flush=True)

asyncio.run(read())
"""


def test_the_request_of_a_frozen_client_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    product = dict(SERVER_OPTIONS)
    times = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    assert product[times[0]] + product[times[1]] <= 15_000
    assert product[times[2]] == product[times[1]]
    quick = [*(product | dict.fromkeys(times, 1500)).items()]
    monkeypatch.setattr("loraserve.node.server.SERVER_OPTIONS", quick)

    async def test() -> None:
        engine = FakeEngine(step_s=0.01)
        async with serving(engine) as (server, _):
            words = [sys.executable, "-c", CLIENT, server.address, str(Path(__file__).parent)]
            client = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
            try:
                assert client.stdout is not None
                assert await asyncio.to_thread(client.stdout.readline) == "0\n"
                client.send_signal(signal.SIGSTOP)
                await until(lambda: not engine.live and not len(server.node.requests), "freed")
            finally:
                client.kill()
                client.communicate()

    run(test)
