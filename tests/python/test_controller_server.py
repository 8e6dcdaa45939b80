"""The controller behind its real wire: uploads, routes, nodes that come and go, restarts."""

import asyncio
import errno
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from controller_fixtures import FakeNode, Site, controller
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loraserve.controller import admission
from loraserve.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    InvalidCheckpointError,
    LoraServeError,
    NotFoundError,
    ResourceExhaustedError,
)
from loraserve.v1 import adapter_pb2, common_pb2, controller_pb2
from loraserve.wire import dial
from loraserve.wire_errors import from_rpc_error

PACKED = b"PACKED base 8 one"
BIGGER = b"PACKED base 64 " + b"x" * (3 << 20)


def play(tmp_path: Path, script: Callable[[Site], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with controller(tmp_path, **options) as site:
            await asyncio.wait_for(script(site), 20)

    asyncio.run(run())


async def refused(call: Awaitable[Any]) -> LoraServeError:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


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


@pytest.mark.parametrize(
    ("fields", "data", "kind", "field"),
    [
        ({}, b"garbage", InvalidCheckpointError, "header"),
        ({"name": "../etc"}, PACKED, InvalidArgumentError, "name"),
        ({"base": ""}, PACKED, InvalidArgumentError, "base"),
        ({"base": "other"}, PACKED, FailedPreconditionError, "base"),
        ({"size_bytes": 3}, PACKED, InvalidArgumentError, "chunk"),
        ({"size_bytes": 300}, PACKED, InvalidArgumentError, "chunk"),
        ({"size_bytes": 0}, b"", InvalidArgumentError, "size_bytes"),
        ({"size_bytes": 2**60}, PACKED, InvalidArgumentError, "size_bytes"),
        ({"name": "taken"}, PACKED, AlreadyExistsError, "name"),
    ],
)
def test_bad_uploads_are_refused_and_leave_nothing(
    tmp_path: Path, fields: dict[str, Any], data: bytes, kind: type, field: str
) -> None:
    async def script(site: Site) -> None:
        await site.create("taken", b"PACKED base 4 other")
        error = await refused(site.create(fields.pop("name", "sql"), data, **fields))
        assert type(error) is kind
        assert error.field == field
        files = [p for p in (tmp_path / "data" / "adapters").rglob("*") if p.is_file()]
        assert len(files) == 1
        assert list((tmp_path / "data" / "staging").iterdir()) == []

    play(tmp_path, script)


def test_a_full_disk_is_told_as_that(tmp_path: Path) -> None:
    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def script(site: Site) -> None:
        error = await refused(site.create("sql", PACKED))
        assert (type(error), error.field) == (ResourceExhaustedError, "store")
        assert list((tmp_path / "data" / "staging").iterdir()) == []
        assert isinstance(await refused(site.get("sql")), NotFoundError)

    play(tmp_path, script, inspector=full)


def test_a_base_mismatch_can_be_allowed(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        made = await site.create("sql", PACKED, base="other", allow_base_mismatch=True)
        assert made.base == "other"
        assert "no node serves the base" in made.unrouted_reason

    play(tmp_path, script)


def test_an_upload_must_begin_with_its_description(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        first = adapter_pb2.CreateAdapterRequest(chunk=b"x")
        call = site.adapters.CreateAdapter([first], metadata=site.auth("acme"))
        error = await refused(call)
        assert (type(error), error.field) == (InvalidArgumentError, "description")
        error = await refused(site.adapters.CreateAdapter([], metadata=site.auth("acme")))
        assert error.field == "description"

    play(tmp_path, script)


def test_an_upload_that_never_begins_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "CHUNK_TIMEOUT_S", 0.2)

    async def script(site: Site) -> None:
        for method in (site.adapters.CreateAdapter, site.adapters.UpdateAdapter):
            error = await refused(asyncio.wait_for(method(metadata=site.auth("acme")), 5))
            assert (error.code, error.field) == ("DEADLINE_EXCEEDED", "description")

    play(tmp_path, script)


def test_a_reader_that_hangs_up_in_the_middle_of_a_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(site: Site) -> None:
        ended = []

        def slow(revision: str, offset: int) -> Iterator[bytes]:
            try:
                while True:
                    time.sleep(0.2)
                    yield b"x"
            finally:
                ended.append(revision)

        made = await site.create("sql", BIGGER)
        site.server._blobs.read = slow  # type: ignore[method-assign, assignment]
        request = adapter_pb2.ReadAdapterRequest(revision=made.revision)
        call = site.adapters.ReadAdapter(request, metadata=site.auth("node"))
        await call.read()
        call.cancel()
        while not ended:
            await asyncio.sleep(0.01)

    play(tmp_path, script)
    assert "unexpected error" not in caplog.text


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


def test_lists_come_in_pages(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        names = [f"a{i}" for i in range(5)]
        for name in reversed(names):
            await site.create(name, PACKED)
        token, pages = "", []
        while True:
            page = await site.adapters.ListAdapters(
                adapter_pb2.ListAdaptersRequest(page_size=2, page_token=token),
                metadata=site.auth("acme"),
            )
            pages.append([a.name for a in page.adapters])
            token = page.next_page_token
            if not token:
                break
        assert pages == [["a0", "a1"], ["a2", "a3"], ["a4"]]
        for bad in ("x", "AAAA", "e30="):
            request = adapter_pb2.ListAdaptersRequest(page_token=bad)
            error = await refused(site.adapters.ListAdapters(request, metadata=site.auth("acme")))
            assert (type(error), error.field) == (InvalidArgumentError, "page_token")

    play(tmp_path, script)


async def read(site: Site, revision: str, offset: int = 0) -> bytes:
    request = adapter_pb2.ReadAdapterRequest(revision=revision, offset_bytes=offset)
    call = site.adapters.ReadAdapter(request, metadata=site.auth("node"))
    messages = [m async for m in call]
    assert messages[0].size_bytes > 0
    return b"".join(m.chunk for m in messages)


def test_nodes_read_blobs_and_resolve_names(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        made = await site.create("sql", BIGGER)
        assert await read(site, made.revision) == BIGGER
        assert await read(site, made.revision, len(BIGGER) - 5) == BIGGER[-5:]
        assert await read(site, made.revision, len(BIGGER)) == b""
        error = await refused(read(site, made.revision, len(BIGGER) + 1))
        assert (type(error), error.field) == (InvalidArgumentError, "offset_bytes")
        assert isinstance(await refused(read(site, "0" * 64)), NotFoundError)
        assert isinstance(await refused(read(site, "../../keys.jsonl")), InvalidArgumentError)
        who = common_pb2.AdapterId(tenant="acme", base="base", name="sql")
        for revision in (None, made.revision):
            request = controller_pb2.ResolveAdapterRequest(adapter=who, revision=revision)
            found = await site.controller.ResolveAdapter(request, metadata=site.auth("node"))
            assert found.load.revision == made.revision
        request = controller_pb2.ResolveAdapterRequest(adapter=who, revision="0" * 64)
        call = site.controller.ResolveAdapter(request, metadata=site.auth("node"))
        assert isinstance(await refused(call), NotFoundError)

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

    asyncio.run(asyncio.wait_for(run(), 20))


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
