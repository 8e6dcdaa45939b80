"""A node with the real engine whose sources of adapters fail in every way: the answers are right or
the request is refused with a reason, the node goes on, and nothing grows."""

import asyncio
import contextlib
import os
import resource
import threading
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from controller_fixtures import Site, controller
from demo_node import serving_demo
from fake_node import until
from node_calls import refused
from pool_fixtures import flipped, header_of, hurry
from pool_site import SKILL, WORD, ask, blob_path, counter, fill, load_info, packed, reads, run

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.durable_store import DurableStore
from loraserve.checkpoint.packed_adapter import pack
from loraserve.controller.admission import PackedCheck
from loraserve.demo import MODEL_NAME
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.pool.options import PoolOptions
from loraserve.node.pool.slots import slot_bytes
from loraserve.node.server import NodeServer
from loraserve.placement.types import AdapterId, AdapterSpec

# A store that lies


def forged(skill: str, other: str) -> bytes:
    """The header of one adapter before as many bytes of another one's data."""
    mine, theirs = packed(skill), packed(other)
    header = header_of(mine)
    data = theirs[header_of(theirs).header_bytes :]
    return mine[: header.header_bytes] + (data * 40)[: header.data_bytes]


BAD = {
    "empty": lambda: b"",
    "half": lambda: packed("upper")[: len(packed("upper")) // 2],
    "one byte short": lambda: packed("upper")[:-1],
    "one byte more": lambda: packed("upper") + b"\0",
    "a bit of the magic": lambda: flipped(packed("upper"), 3),
    "a bit of the header": lambda: flipped(packed("upper"), 100),
    "a bit of the data": lambda: flipped(packed("upper"), -1),
    "another adapter": lambda: packed("rot13"),
    "another one's data": lambda: forged("upper", "rot13"),
    "noise": lambda: os.urandom(len(packed("upper"))),
}


@asynccontextmanager
async def node_of(
    site: Site, tmp_path: Path, store: Path, **options: Any
) -> AsyncIterator[tuple[NodeServer, grpc.aio.Channel]]:
    """A node that reads from `store` first, and from the controller where that does not do."""
    async with serving_demo(
        store=store,
        controller=site.server.address,
        controller_key=site.keys["node"],
        keys=tmp_path / "keys.jsonl",
        **options,
    ) as (server, channel):
        yield server, channel


def test_a_store_that_lies_in_every_way_serves_nothing_wrong(tmp_path: Path) -> None:
    """The node tells it each time, and asks the controller."""

    async def test() -> None:
        store = tmp_path / "replica"
        async with (
            controller(tmp_path, new_check=PackedCheck) as site,
            node_of(site, tmp_path, store) as (server, channel),
        ):
            for number, (what, content) in enumerate(BAD.items(), 1):
                path = blob_path(store, "upper")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content())
                server.node.adapters.host.fetch._known.clear()
                await site.create("upper", packed("upper"), base=MODEL_NAME)
                right = SKILL["upper"].answer(WORD)
                assert await ask(channel, "upper", site.auth("acme")) == right, what
                assert reads(server, "controller", "fetched") == number, what
                await site.delete("upper", base=MODEL_NAME)
                await until(lambda: not server.node.adapters.residency(), "dropped")
                pool = server.node.adapters.host.pool
                assert pool.bytes_free == pool.capacity_bytes
            assert reads(server, "store", "fetched") == 0
            assert reads(server, "store", "corrupt") >= len(BAD)

    run(test)


def test_where_there_is_no_other_source_the_request_is_refused_and_the_node_goes_on(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        fill(tmp_path, "upper", "rot13")
        path = blob_path(tmp_path, "upper")
        async with serving_demo(store=tmp_path) as (server, channel):
            adapters = server.node.adapters
            for content in BAD.values():
                path.write_bytes(content())
                adapters.host.fetch._known.clear()
                held = adapters.begin_load(load_info("upper"), placed=True)
                await held.settled.wait()
                error = await refused(ask(channel, "upper"))
                assert error.code in ("FAILED_PRECONDITION", "UNAVAILABLE")
                assert error.field == "adapter"
            other = adapters.begin_load(load_info("rot13"), placed=True)
            await other.settled.wait()
            assert await ask(channel, "rot13") == SKILL["rot13"].answer(WORD)
            path.write_bytes(packed("upper"))  # repaired
            held = adapters.begin_load(load_info("upper"), placed=True)
            await held.settled.wait()
            assert await ask(channel, "upper") == SKILL["upper"].answer(WORD)

    run(test)


# A store that is away


def test_a_store_that_cannot_be_reached_or_hangs_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe in the place of a file: opening it waits for a writer, as a dead NFS server would."""
    hurry(monkeypatch, "store", 0.5)
    store = tmp_path / "replica"
    path = blob_path(store, "upper")

    async def test() -> None:
        async with (
            controller(tmp_path, new_check=PackedCheck) as site,
            node_of(site, tmp_path, store) as (server, channel),
        ):
            path.parent.mkdir(parents=True)
            os.mkfifo(path)
            await site.create("upper", packed("upper"), base=MODEL_NAME)
            right = SKILL["upper"].answer(WORD)
            assert await ask(channel, "upper", site.auth("acme")) == right
            assert reads(server, "store", "failed") == 1
            assert reads(server, "controller", "fetched") == 1
            await site.delete("upper", base=MODEL_NAME)
            await until(lambda: not server.node.adapters.residency(), "dropped")
            path.unlink()
            for folder in store.iterdir():
                folder.rmdir()
            store.chmod(0)  # nothing there any more, and no way to it
            await site.create("upper", packed("upper"), base=MODEL_NAME)
            assert await ask(channel, "upper", site.auth("acme")) == right
            assert reads(server, "controller", "fetched") == 2

    try:
        run(test)
    finally:
        store.chmod(0o700)
        if path.exists():  # lets the threads go that wait for a writer
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


# The disk cache


def test_a_node_lives_on_its_disk_cache_and_survives_its_damage(tmp_path: Path) -> None:
    store, cache = tmp_path / "store", tmp_path / "cache"
    fill(store, "upper", "rot13", "stars")
    pool = PoolOptions(host_pool_bytes=16 << 20, disk_cache=cache)

    async def get(server: NodeServer, channel: grpc.aio.Channel, skill: str) -> None:
        held = server.node.adapters.begin_load(load_info(skill), placed=True)
        await held.settled.wait()
        assert held.error is None
        assert await ask(channel, skill) == SKILL[skill].answer(WORD)

    async def first() -> None:
        async with serving_demo(store=store, pool=pool) as (server, channel):
            for skill in ("upper", "rot13"):
                await get(server, channel, skill)
            disk = server.node.adapters.host.disk
            assert disk is not None
            await until(lambda: disk.files == 2, "kept")

    async def again() -> None:
        async with serving_demo(store=store, pool=pool) as (server, channel):
            for skill in ("upper", "rot13", "stars"):
                await get(server, channel, skill)
            assert reads(server, "disk", "fetched") == 1
            assert reads(server, "disk", "corrupt") == 1
            assert reads(server, "store", "fetched") == 2
            disk = server.node.adapters.host.disk
            assert disk is not None
            await until(lambda: disk.files == 3, "kept again")
            assert disk.bytes_held == sum(
                len(packed(skill)) for skill in ("upper", "rot13", "stars")
            )

    run(first)
    damaged = cache / f"{header_of(packed('rot13')).revision}.lora"
    damaged.write_bytes(flipped(packed("rot13"), -5))
    blob_path(store, "upper").unlink()
    run(again)
    assert damaged.read_bytes() == packed("rot13")


def test_a_disk_that_is_full_is_no_trouble_of_a_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "store", "upper", "rot13")
    pool = PoolOptions(host_pool_bytes=16 << 20, disk_cache=tmp_path / "cache")

    async def test() -> None:
        async with serving_demo(store=tmp_path / "store", pool=pool) as (server, channel):
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            try:
                for skill in ("upper", "rot13"):
                    held = server.node.adapters.begin_load(load_info(skill), placed=True)
                    await held.settled.wait()
                    assert await ask(channel, skill) == SKILL[skill].answer(WORD)
                await until(lambda: not server.node.adapters.host._disk_writes, "tried")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert list((tmp_path / "cache").iterdir()) == []

    run(test)
    assert caplog.text.count("is not kept: File too large") == 1


# Many loads


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


def cycles(tmp_path: Path, count: int, growth_bytes: int) -> None:
    """`count` loads, each of which evicts what was loaded before, with an answer in between."""
    skills = ["upper", "stars", "rot13", "zigzag", "next", "piglatin"]
    fill(tmp_path, *skills)
    # Room for the two largest: each load evicts, and sizes differ, so the free memory is in pieces.
    capacity = 2 * max(slot_bytes(len(packed(skill))) for skill in skills)
    pool = PoolOptions(host_pool_bytes=capacity, disk_cache=tmp_path / "cache")

    async def test() -> None:
        async with serving_demo(store=tmp_path, pool=pool) as (server, channel):
            adapters = server.node.adapters
            warm = min(30, count // 2)
            for number in range(count):
                if number == warm:
                    before = resident_bytes(), len(os.listdir("/proc/self/fd"))
                    threads = threading.active_count()
                skill = skills[number * 7 % len(skills)]
                held = adapters.begin_load(load_info(skill), placed=False)
                await held.settled.wait()
                assert held.error is None
                if number % 10 == 0:
                    assert await ask(channel, skill) == SKILL[skill].answer(WORD)
            await until(lambda: not adapters.host._disk_writes, "written")
            assert counter(server, "loraserve_adapter_evictions_total", tier="host") > count / 3
            assert resident_bytes() - before[0] < growth_bytes
            assert len(os.listdir("/proc/self/fd")) <= before[1] + 4
            assert threading.active_count() <= threads + 4
            for copy in list(adapters._all()):
                adapters.begin_drop(copy)
            await until(lambda: not adapters.residency(), "dropped")
            await until(lambda: adapters.host.pool.bytes_free == capacity, "given back")
            assert adapters.host._holders == {}

    run(test, limit_s=max(180, count))


def test_sixty_loads_and_evictions_leave_nothing_behind(tmp_path: Path) -> None:
    cycles(tmp_path, 60, 32 << 20)


@pytest.mark.long
def test_a_thousand_loads_and_evictions_leave_nothing_behind(tmp_path: Path) -> None:
    cycles(tmp_path, 1000, 48 << 20)


# What it tells


def test_the_pool_and_its_sources_are_in_the_metrics(tmp_path: Path) -> None:
    fill(tmp_path / "store", "upper", "rot13")
    blob_path(tmp_path / "store", "rot13").write_bytes(forged("rot13", "upper"))
    capacity = 16 << 20
    pool = PoolOptions(host_pool_bytes=capacity, disk_cache=tmp_path / "cache")

    async def test() -> None:
        async with serving_demo(
            store=tmp_path / "store", pool=pool, metrics_listen="127.0.0.1:0"
        ) as (server, channel):
            host = server.node.adapters.host
            assert host.disk is not None
            for skill in ("upper", "rot13"):
                held = server.node.adapters.begin_load(load_info(skill), placed=True)
                await held.settled.wait()
            await ask(channel, "upper")
            await until(lambda: bool(host.disk and host.disk.files), "kept")
            await until(lambda: not host._disk_writes, "written")
            size = len(packed("upper"))
            lease = host.pool.lease(header_of(packed("upper")).revision, 60)
            url = f"http://{server.metrics_address}/metrics"
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
            told = dict(
                line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")
            )
            for series, value in {
                'loraserve_adapter_reads_total{outcome="fetched",source="store"}': 1,
                'loraserve_adapter_reads_total{outcome="corrupt",source="store"}': 1,
                'loraserve_adapter_read_bytes_total{source="store"}': size,
                'loraserve_adapter_read_seconds_count{source="store"}': 1,
                'loraserve_adapter_lookups_total{result="hit"}': 1,
                'loraserve_adapter_tier_copies{tier="host"}': 1,
                'loraserve_adapter_tier_copies{tier="disk"}': 1,
                'loraserve_host_pool_bytes{use="held"}': slot_bytes(size),
                'loraserve_host_pool_bytes{use="free"}': capacity - slot_bytes(size),
                'loraserve_host_pool_bytes{use="writing"}': 0,
                'loraserve_host_pool_bytes{use="quarantined"}': 0,
                "loraserve_host_pool_leased_bytes": slot_bytes(size),
                "loraserve_host_pool_leases": 1,
                "loraserve_disk_cache_bytes": size,
            }.items():
                assert float(told[series]) == value, series
            host.pool.release(lease.lease_id)

    run(test)


def test_an_adapter_of_another_model_is_refused_and_leaves_the_pool(tmp_path: Path) -> None:
    """Its bytes are right, and the engine will not have it: its memory goes back."""
    import numpy as np

    weights = np.ones((3, 16), np.float32)
    data = pack(
        AdapterSource("x", (AdapterModule(0, "q_proj", 3, 2.0, "F32", weights, weights.T),))
    )
    header = header_of(data)
    path = Path(DurableStore(str(tmp_path)).path_of(header.revision))
    path.parent.mkdir(parents=True)
    path.write_bytes(data)

    async def test() -> None:
        async with serving_demo(store=tmp_path) as (server, _):
            adapter = AdapterId("default", MODEL_NAME, "odd")
            spec = AdapterSpec(adapter, header.revision, header.size_bytes, 3)
            held = server.node.adapters.begin_load(AdapterLoadInfo(spec), placed=True)
            await held.settled.wait()
            assert "q_proj" in str(held.error)
            pool = server.node.adapters.host.pool
            await until(lambda: pool.bytes_free == pool.capacity_bytes, "given back")

    run(test)
