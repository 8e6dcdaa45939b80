"""NodeService, health and tenants of a node over real gRPC, with an engine in memory."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc.aio
from fake_node import BASE, CONTEXT, FACTS, SIZE, FakeEngine, letter_of, revision, serving, until
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import (
    health_pb2,
    health_pb2_grpc,
)
from node_calls import answers, generate, refused, run, store_with

from loraserve.checkpoint.packed_adapter import load_adapter_source
from loraserve.node.engine_api import LoadedModel
from loraserve.node.server import NodeOptions, NodeServer
from loraserve.security import Role, create_key
from loraserve.v1 import common_pb2, node_pb2, node_pb2_grpc
from loraserve.v1.inference_pb2 import FINISH_REASON_CANCELLED
from loraserve.wire import bearer_metadata, dial


def test_abort_ends_a_request_with_what_it_has() -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.02)
        async with serving(engine) as (_, channel):
            service = node_pb2_grpc.NodeServiceStub(channel)
            running = generate(channel, sampling={"max_tokens": 100_000})
            out = [await running.read()]
            assert (await service.Abort(node_pb2.AbortRequest(request_id="r"))).found
            while (message := await running.read()) is not grpc.aio.EOF:
                out.append(message)
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
        async with serving(engine, keys=keys, store=store_with(tmp_path, "a")) as (_, channel):
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
                answers(channel, adapter=sql, sampling={"max_tokens": 100_000}, metadata=key["ann"])
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


def test_operators_load_list_and_unload(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.02)
        async with serving(engine, store=store_with(tmp_path, "a", "b")) as (server, channel):
            service = node_pb2_grpc.NodeServiceStub(channel)
            sql = common_pb2.AdapterId(tenant="default", base=BASE, name="sql")

            def load(letter: str) -> Any:
                wanted = node_pb2.AdapterLoad(adapter=sql, revision=revision(letter))
                return service.LoadAdapter(node_pb2.LoadAdapterRequest(load=wanted))

            held = (await load("a")).residency
            assert [(r.revision, r.state) for r in held] == [
                (revision("a"), common_pb2.RESIDENCY_STATE_HOST)
            ]
            assert held[0].size_bytes == SIZE
            running = asyncio.ensure_future(
                answers(channel, "old", adapter={"name": "sql"}, sampling={"max_tokens": 100_000})
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
                letter_of(r.revision): r.state
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
        async with serving(engine) as (server, channel):
            service = node_pb2_grpc.NodeServiceStub(channel)
            health = health_pb2_grpc.HealthStub(channel)

            async def status() -> Any:
                name = "loraserve.v1.InferenceService"
                return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

            assert await status() == health_pb2.HealthCheckResponse.SERVING
            running = asyncio.ensure_future(answers(channel, sampling={"max_tokens": 100_000}))
            await until(lambda: len(engine.live) == 1, "running")
            draining = asyncio.ensure_future(
                service.Drain(node_pb2.DrainRequest(timeout=Duration(nanos=200_000_000)))
            )
            await until(lambda: server.node.draining, "drains")
            assert (await refused(answers(channel, "late"))).code == "UNAVAILABLE"
            assert await status() == health_pb2.HealthCheckResponse.NOT_SERVING
            assert (await draining).ended_requests == 1
            assert (await refused(running)).code == "UNAVAILABLE"

    run(test)


def test_the_node_refuses_until_its_model_is_there() -> None:
    async def test() -> None:
        may_open = threading.Event()

        def slow() -> LoadedModel:
            assert may_open.wait(60)
            return LoadedModel(FakeEngine(), FACTS)

        server = NodeServer(NodeOptions("n1", BASE), slow, load_adapter_source)
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
