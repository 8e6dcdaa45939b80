"""Copies in the host pool: one fetch for all who want a revision, one slot for all its names."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_node import (
    FakeSource,
    blob,
    host_copies,
    letter_of,
    load_of,
    pool_bytes,
    revision,
    until,
)

from loraserve.checkpoint.packed_adapter import parse_packed
from loraserve.errors import ResourceExhaustedError, UnavailableError
from loraserve.node.pool.copies import HostCopies, HostCopy
from loraserve.node.pool.disk_cache import DiskCache


def no_room(size: int) -> "set[asyncio.Future[None]]":
    raise ResourceExhaustedError("host_pool_bytes", "nothing may go")


class Site:
    def __init__(self, adapters: int, disk: DiskCache | None = None) -> None:
        self.source = FakeSource(*"abcdef")
        self.host = host_copies(pool_bytes(adapters), self.source, disk=disk)
        self.host.disk = disk

    async def obtain(self, letter: str, make_room: Any = no_room) -> HostCopy:
        return await self.host.obtain(load_of("sql", letter), make_room)

    @property
    def held(self) -> str:
        return "".join(sorted(letter_of(r) for r in self.host.pool._slots))

    def is_empty(self) -> bool:
        return self.host.pool.bytes_free == self.host.pool.capacity_bytes


def play(script: Callable[[Site], Awaitable[None]], adapters: int = 2, **options: Any) -> None:
    async def run() -> None:
        site = Site(adapters, **options)
        await asyncio.wait_for(script(site), 120)
        await site.host.close()

    asyncio.run(run())


def test_all_who_want_a_revision_share_one_fetch_and_one_slot() -> None:
    async def script(site: Site) -> None:
        copies = await asyncio.gather(*(site.obtain("a") for _ in range(5)))
        copies.append(await site.obtain("a"))
        assert len(site.source.fetches) == 1
        assert {copy.slot for copy in copies} == {site.host.pool.find(revision("a"))}
        assert bytes(copies[0].slot.view) == blob("a")
        for copy in copies[:-1]:
            site.host.give_back(copy)
        assert site.held == "a"
        site.host.give_back(copies[-1])
        assert site.is_empty()

    play(script)


def test_what_the_engine_reads_is_the_slot_itself() -> None:
    async def script(site: Site) -> None:
        copy = await site.obtain("a")
        slot = np.frombuffer(copy.slot.view, np.uint8)
        (module,) = copy.packed.modules
        for array in (module.a, module.b_transposed):
            assert np.shares_memory(array, slot)
            assert not array.flags.writeable
            assert array.flags.aligned
        assert copy.packed.header == parse_packed(blob("a")).header

    play(script)


def test_one_who_leaves_does_not_end_the_fetch_and_the_last_one_does() -> None:
    async def script(site: Site) -> None:
        site.source.gate = asyncio.Event()
        first, second = (asyncio.create_task(site.obtain("a")) for _ in range(2))
        await until(lambda: len(site.source.fetches) == 1, "fetching")
        first.cancel()
        await asyncio.wait({first})
        site.source.gate.set()
        site.host.give_back(await second)
        assert site.is_empty()
        site.source.gate.clear()
        alone = asyncio.create_task(site.obtain("a"))
        await until(lambda: len(site.source.fetches) == 2, "fetching")
        alone.cancel()
        await until(site.is_empty, "given back")
        site.source.gate.set()
        site.host.give_back(await site.obtain("a"))  # by a fetch of its own
        assert len(site.source.fetches) == 3

    play(script)


@pytest.mark.parametrize("turns", range(25))
def test_leaving_at_any_moment_leaves_nothing(turns: int) -> None:
    async def script(site: Site) -> None:
        tasks = [asyncio.create_task(site.obtain("a")) for _ in range(2)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        for copy in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(copy, HostCopy):
                site.host.give_back(copy)
        again = await site.obtain("a")
        assert bytes(again.slot.view) == blob("a")
        site.host.give_back(again)
        await until(site.is_empty, "given back")

    play(script)


def test_a_failed_fetch_is_told_to_all_and_takes_no_memory() -> None:
    async def script(site: Site) -> None:
        site.source.error = UnavailableError("store", "is away")
        told = await asyncio.gather(*(site.obtain("a") for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in told] == ["store: is away"] * 3
        assert site.is_empty()
        site.source.error = None
        assert (await site.obtain("a")).slot

    play(script)


def test_room_is_made_in_the_order_of_asking() -> None:
    """What is given up for one is not taken by another who came later."""

    async def script(site: Site) -> None:
        held = [await site.obtain("a"), await site.obtain("b")]
        asked: list[int] = []

        def make_room(size: int) -> "set[asyncio.Future[None]]":
            asked.append(size)

            async def give_up() -> None:
                await asyncio.sleep(0.01)
                site.host.give_back(held.pop(0))

            return {asyncio.ensure_future(give_up())}

        first = asyncio.create_task(site.obtain("c", make_room))
        await until(lambda: bool(asked), "room is being made")
        second = asyncio.create_task(site.obtain("d", make_room))
        await asyncio.gather(first, second)
        assert (site.held, len(asked)) == ("cd", 2)
        with pytest.raises(ResourceExhaustedError, match="nothing may go"):
            await site.obtain("e")

    play(script)


def test_a_fetch_that_was_left_does_not_end_the_place_of_the_next_one() -> None:
    async def script(site: Site) -> None:
        gates = [asyncio.Event(), asyncio.Event()]
        right = site.source.read_into

        async def slow(*arguments: Any) -> None:
            gate = gates[len(site.source.fetches)]
            await right(*arguments)
            while not gate.is_set():  # as a read that ends only when nothing writes any more
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.001)

        site.source.read_into = slow  # type: ignore[method-assign]
        left = asyncio.create_task(site.obtain("a"))
        await until(lambda: len(site.source.fetches) == 1, "the first fetch runs")
        (first,) = (coming.task for coming in site.host._coming.values())
        left.cancel()
        await asyncio.wait({left})
        staying = asyncio.create_task(site.obtain("a"))
        await until(lambda: len(site.source.fetches) == 2, "the second one too")
        gates[0].set()
        await asyncio.wait({first})
        await until(lambda: site.held == "", "what came for nobody has gone")
        assert site.host.has_memory(revision("a"))
        gates[1].set()
        site.host.give_back(await staying)
        await until(site.is_empty, "the memory is back")
        assert not site.host._reserved

    play(script)


def test_a_copy_that_another_node_reads_is_found_again_without_a_fetch() -> None:
    async def script(site: Site) -> None:
        pool = site.host.pool
        copy = await site.obtain("a")
        lease = pool.lease(revision("a"), 60)
        site.host.give_back(copy)
        assert pool.find(revision("a")) is None
        assert not site.is_empty()  # the reader has its promise
        back = await site.obtain("a")
        assert back.slot is copy.slot
        assert len(site.source.fetches) == 1
        assert not site.host.is_only_held(back.slot)
        pool.release(lease.lease_id)
        assert site.host.is_only_held(back.slot)
        site.host.give_back(back)
        assert site.is_empty()

    play(script)


def test_what_somebody_else_has_read_can_be_put() -> None:
    async def script(site: Site) -> None:
        packed = parse_packed(blob("f"))
        copies = [await site.host.put(packed, no_room) for _ in range(2)]
        assert copies[0].slot is copies[1].slot
        assert copies[0].packed.blob is not packed.blob
        assert bytes(copies[0].slot.view) == blob("f")
        assert (await site.obtain("f")).slot is copies[0].slot
        assert site.source.fetches == []

    play(script)


def test_what_was_fetched_goes_to_the_disk_and_comes_back_from_there(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 1 << 20)

    async def script(site: Site) -> None:
        copy = await site.obtain("a")
        await until(lambda: disk.has(revision("a")), "on disk")
        await until(lambda: not site.host._disk_writes, "written")
        site.host.give_back(copy)
        assert site.is_empty()
        site.source.error = UnavailableError("store", "is away")
        back = await site.obtain("a")
        assert bytes(back.slot.view) == blob("a")
        assert len(site.source.fetches) == 1

    with contextlib.closing(disk):
        play(script, disk=disk)


def test_a_slot_is_not_reused_while_it_is_written_to_disk(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 1 << 20)

    async def script(site: Site) -> None:
        go_on = threading.Event()
        keep = disk.keep

        def slow(name: str, data: memoryview) -> None:
            go_on.wait(60)
            keep(name, data)

        disk.keep = slow  # type: ignore[method-assign]
        site.host.give_back(await site.obtain("a"))
        assert not site.is_empty()
        waiting = asyncio.create_task(site.obtain("b", lambda size: set()))
        await asyncio.sleep(0.05)
        assert not waiting.done()  # it waits for the disk, and not in vain
        go_on.set()
        assert bytes((await waiting).slot.view) == blob("b")
        assert disk._path(revision("a")).read_bytes() == blob("a")

    with contextlib.closing(disk):
        play(script, adapters=1, disk=disk)


def test_the_pool_of_a_closed_site_has_no_task_left() -> None:
    async def run() -> None:
        site = Site(2)
        site.source.gate = asyncio.Event()
        waiting = asyncio.create_task(site.obtain("a"))
        await until(lambda: bool(site.source.fetches), "fetching")
        await site.host.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert site.is_empty()

    asyncio.run(run())


def test_hosts_are_independent() -> None:
    async def run() -> None:
        one, two = Site(1), Site(1)
        assert isinstance(one.host, HostCopies)
        await one.obtain("a")
        await two.obtain("b")
        assert (one.held, two.held) == ("a", "b")

    asyncio.run(run())
