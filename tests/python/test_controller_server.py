"""The controller behind its real wire: routes, nodes that come and go, restarts."""

import asyncio
import urllib.request
from pathlib import Path
from typing import Any

from controller_fixtures import (
    BIGGER,
    PACKED,
    FakeNode,
    Site,
    controller,
    play,
    read,
    refused,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from loraserve.v1 import adapter_pb2, common_pb2, controller_pb2
from loraserve.wire import dial


def test_an_adapter_from_upload_to_route_to_removal(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        async with FakeNode(site, "n1") as node:
            made = await site.create("sql", PACKED)
            assert (made.tenant, made.base, made.name) == ("acme", "base", "sql")
            assert (made.size_bytes, made.max_rank) == (len(PACKED), 8)
            assert made.create_time.ToMicroseconds() == made.update_time.ToMicroseconds() > 0
            held = await site.served("sql", ["n1"])
            assert held.revision == made.revision
            assert held.unrouted_reason == ""
            assert node.commands[0].load.size_bytes == len(PACKED)
            await site.delete("sql")
            assert isinstance(await refused(site.get("sql")), NotFoundError)
            while node.held:
                await asyncio.sleep(0.01)

    play(tmp_path, script)


def test_an_update_is_served_and_can_be_taken_back(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        async with FakeNode(site, "n1", memory=10 << 20):
            first = await site.create("sql", PACKED)
            await site.served("sql", ["n1"])
            second = await site.update("sql", BIGGER)
            assert second.max_rank == 64
            assert second.create_time == first.create_time
            await site.served("sql", ["n1"])
            back = await site.update("sql", b"", revision=first.revision)
            assert back.revision == first.revision
            stale = site.update("sql", PACKED, expected_revision=second.revision)
            assert isinstance(await refused(stale), FailedPreconditionError)
            never = site.update("sql", b"", revision="0" * 64)
            assert isinstance(await refused(never), NotFoundError)

    play(tmp_path, script)


def test_tenants_do_not_see_each_other(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        await site.create("sql", PACKED)
        mine = await site.create("poet", PACKED, who="zeta")
        absent = await refused(site.get("nothing", who="zeta"))
        foreign = await refused(site.get("sql", who="zeta"))
        assert str(absent).replace("nothing", "sql") == str(foreign)
        assert isinstance(await refused(site.delete("sql", who="zeta")), NotFoundError)
        listed = await site.adapters.ListAdapters(
            adapter_pb2.ListAdaptersRequest(), metadata=site.auth("zeta")
        )
        assert [a.name for a in listed.adapters] == ["poet"]
        async for message in site.watch("zeta"):
            assert [r.adapter.name for r in message.adapters] == ["poet"]
            break
        # Both have the same bytes; one's removal must not take the other's.
        await site.delete("sql")
        assert await read(site, mine.revision) == PACKED

    play(tmp_path, script)


def test_routes_follow_a_node_that_dies(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        async with FakeNode(site, "n1") as n1, FakeNode(site, "n2") as n2:
            await site.create("sql", PACKED)
            first, second = (n1, n2) if await _held_by(site, n1) else (n2, n1)
            versions, full = [], []
            async for message in site.watch("node"):
                versions.append((message.epoch, message.version))
                full.append(message.full)
                if len(versions) == 1:
                    assert [n.node_id for n in message.nodes] == ["n1", "n2"]
                    await first.kill()
                holders = [
                    h.node_id for r in message.adapters for v in r.revisions for h in v.holders
                ]
                if holders == [second.node_id]:
                    break
            assert versions == sorted(set(versions))
            assert full == [True] + [False] * (len(full) - 1)

    play(tmp_path, script)


async def _held_by(site: Site, node: FakeNode) -> bool:
    while True:
        holders = [h.node_id for h in (await site.get("sql")).holders]
        if holders:
            return holders == [node.node_id]
        await asyncio.sleep(0.01)


def test_a_watcher_that_is_up_to_date_gets_no_table(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        await site.create("sql", PACKED)
        async for message in site.watch("acme"):
            known = {"known_epoch": message.epoch, "known_version": message.version}
            break
        async for message in site.watch("acme", **known):
            assert not message.full
            assert not message.adapters
            break
        async for message in site.watch("acme", known_epoch=known["known_epoch"] - 1):
            assert message.full
            break

    play(tmp_path, script)


def test_a_failed_load_is_told_to_the_user(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        async with FakeNode(site, "n1") as node:
            node.refuse = "disk is full"
            await site.create("sql", PACKED)
            while "disk is full" not in (await site.get("sql")).unrouted_reason:
                await asyncio.sleep(0.01)
            node.refuse = None
            await site.served("sql", ["n1"])

    play(tmp_path, script)


def test_bad_registrations(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        node = FakeNode(site, "n1", incarnation=5)
        await node.register(base=common_pb2.BaseModel(name="base", digest="d1"))
        other = FakeNode(site, "n2")
        for fields, kind, field in (
            ({"address": "0.0.0.0:1"}, InvalidArgumentError, "address"),
            ({"address": "nowhere"}, InvalidArgumentError, "address"),
            ({"node_id": "N 1"}, InvalidArgumentError, "node_id"),
            ({"node_id": "n1"}, FailedPreconditionError, "incarnation"),
            (
                {"base": common_pb2.BaseModel(name="base", digest="d2")},
                FailedPreconditionError,
                "base.digest",
            ),
        ):
            error = await refused(other.register(**fields))
            assert (type(error), error.field) == (kind, field)

    play(tmp_path, script)


def test_a_stranger_does_not_take_a_nodes_stream(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        async with FakeNode(site, "n1", incarnation=2) as node:
            old = FakeNode(site, "n1", incarnation=1)
            call = site.controller.Heartbeat(metadata=site.auth("node"))
            await call.write(old.beat())
            assert (await call.read()).must_register
            await site.create("sql", PACKED)
            await site.served("sql", ["n1"])
            assert node.registrations == 1

    play(tmp_path, script)


def test_a_bad_heartbeat_ends_the_stream_with_its_reason(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        node = FakeNode(site, "n1")
        await node.register()
        residency = common_pb2.AdapterResidency(revision="short", state=4)
        for wrong, field in (
            ({"node_id": "n2"}, "node_id"),
            ({"residency": [residency]}, "residency.revision"),
        ):
            call = site.controller.Heartbeat(metadata=site.auth("node"))
            await call.write(node.beat())
            assert not (await call.read()).must_register
            bad = node.beat()
            bad.MergeFrom(controller_pb2.HeartbeatRequest(**wrong))
            await call.write(bad)
            error = await refused(call.read())
            assert (type(error), error.field) == (InvalidArgumentError, field)

    play(tmp_path, script)


def test_everything_comes_back_after_a_restart(tmp_path: Path) -> None:
    async def run() -> None:
        async with controller(tmp_path) as site, FakeNode(site, "n1"):
            made = await site.create("sql", PACKED)
            await site.served("sql", ["n1"])
            epoch = site.server.runtime.state.epoch
        async with controller(tmp_path) as site:
            assert site.server.runtime.state.epoch == epoch + 1
            assert (await site.get("sql")).revision == made.revision
            assert await read(site, made.revision) == PACKED
            async with FakeNode(site, "n1"):
                await site.served("sql", ["n1"])

    asyncio.run(asyncio.wait_for(run(), 120))


def test_health_and_metrics(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        async with FakeNode(site, "n1"), dial(site.server.address) as channel:
            await site.create("sql", PACKED)
            await site.served("sql", ["n1"])
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for name in ("", "loraserve.v1.ControllerService", "loraserve.v1.AdapterService"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            url = f"http://{site.server.metrics_address}/metrics"
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
        for line in (
            'loraserve_queue_depth{node="n1"} 7.0',
            'loraserve_pages{node="n1",use="kv"} 3.0',
            'loraserve_adapter_resident{node="n1",state="device"} 1.0',
            "loraserve_adapters 1.0",
            'loraserve_requests_total{method="/loraserve.v1.AdapterService/CreateAdapter"} 1.0',
        ):
            assert line in text

    play(tmp_path, script, metrics_listen="127.0.0.1:0")
