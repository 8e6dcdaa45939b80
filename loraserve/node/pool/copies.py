"""Packed adapters in the host pool by revision: fetched once for all who want them, kept while
anybody holds them."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from loraserve.checkpoint.packed_adapter import PackedAdapter, view_packed
from loraserve.checkpoint.packed_header import parse_header
from loraserve.errors import ResourceExhaustedError, UnavailableError
from loraserve.node.blocking import BlockingCalls
from loraserve.node.fetch import AdapterFetch
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.pool.disk_cache import DiskCache
from loraserve.node.pool.slots import HostPool, Slot, SlotWriter

_log = logging.getLogger(__name__)

# Copies that are given up may be in use for a few steps of the engine.
_ROOM_S = 60.0
_DISK_WRITES = 2

# Begins to give up what is in the way of so many bytes in one piece; the futures that end when some
# of it has gone. Raises ResourceExhaustedError where that cannot be enough.
MakeRoom = Callable[[int], "set[asyncio.Future[None]]"]


@dataclass(frozen=True, eq=False)
class HostCopy:
    """A packed adapter in the pool, held. `packed` are views of the slot."""

    slot: Slot
    packed: PackedAdapter


class _Coming:
    """A fetch, and how many wait for it."""

    def __init__(self, task: "asyncio.Task[Slot]") -> None:
        self.task = task
        self.waiting = 0


class HostCopies:
    """Event loop only."""

    def __init__(self, pool: HostPool, fetch: AdapterFetch, disk: DiskCache | None = None) -> None:
        """`disk` gets what is fetched from elsewhere."""
        self.pool = pool
        self.fetch = fetch
        self.disk = disk
        self._holders: Counter[Slot] = Counter()
        self._coming: dict[str, _Coming] = {}
        self._reserved: Counter[str] = Counter()
        self._reserving = asyncio.Lock()
        self._disk_calls = BlockingCalls("disk-cache", _DISK_WRITES)
        self._disk_writes: dict[asyncio.Task[None], Slot] = {}

    # What is here

    def has_memory(self, revision: str) -> bool:
        """It is in the pool, or has its place there."""
        return self._reserved[revision] > 0 or self.pool.find(revision) is not None

    def is_only_held(self, slot: Slot) -> bool:
        """Its memory goes back soon after its holders give it up: no other node reads it."""
        writing = slot in self._disk_writes.values()
        return not slot.leases and slot.pins == self._holders[slot] + writing > writing

    # Holding

    async def obtain(self, load: AdapterLoadInfo, make_room: MakeRoom) -> HostCopy:
        """The revision's copy, fetched where it is not here. `give_back` what it returns. Raises
        what AdapterFetch and `make_room` raise."""
        revision = load.spec.revision
        slot = self.pool.find(revision) or self.pool.revive(revision)
        if slot is not None:
            return self._copy(slot)
        coming = self._coming.get(revision)
        if coming is None:
            coming = _Coming(asyncio.create_task(self._bring(load, make_room)))
            self._coming[revision] = coming
        coming.waiting += 1
        try:
            return self._copy(await asyncio.shield(coming.task))
        finally:
            coming.waiting -= 1
            if not coming.waiting:
                del self._coming[revision]
                if coming.task.done():
                    self._left(coming.task)
                else:  # it may come to its end all the same
                    coming.task.cancel()
                    coming.task.add_done_callback(self._left)

    def _left(self, task: "asyncio.Task[Slot]") -> None:
        """Nobody waits for the task any more, and it has ended."""
        if not task.cancelled() and task.exception() is None:
            self._let_go(task.result())

    async def put(self, packed: PackedAdapter, make_room: MakeRoom) -> HostCopy:
        """A copy of what somebody else has read and checked. `give_back` what it returns."""
        slot = self.pool.find(packed.revision) or self.pool.revive(packed.revision)
        if slot is None:
            writer = await self._reserve(packed.size_bytes, make_room)
            writer.view[:] = packed.blob
            slot = writer.seal(packed.revision)
        return self._copy(slot)

    def _copy(self, slot: Slot) -> HostCopy:
        self._hold(slot)
        return HostCopy(slot, view_packed(parse_header(slot.view), slot.view))

    def give_back(self, copy: HostCopy) -> None:
        """Once for each copy, when nothing reads its views any more. With its last holder it leaves
        the pool."""
        self._let_go(copy.slot)

    def _hold(self, slot: Slot) -> None:
        self.pool.pin(slot.revision)
        self._holders[slot] += 1

    def _let_go(self, slot: Slot) -> None:
        self._holders[slot] -= 1
        if not self._holders[slot]:
            del self._holders[slot]
            self.pool.drop(slot.revision)
        self.pool.unpin(slot)

    # Fetching

    async def _bring(self, load: AdapterLoadInfo, make_room: MakeRoom) -> Slot:
        """The slot, held once for those who wait for it."""
        revision = load.spec.revision
        start = await self.fetch.start(load)
        writer = await self._reserve(start.header.size_bytes, make_room)
        # Counted: of a fetch that nobody waits for any more and of the one after it, both may run.
        self._reserved[revision] += 1
        try:
            source = await self.fetch.fill(load, start, writer)
            # Of a fetch that nobody waited for any more and that ended in this very moment.
            slot = self.pool.find(revision) or writer.seal(revision)
            writer.abandon()
        except BaseException:
            writer.abandon()
            raise
        finally:
            self._reserved[revision] -= 1
            if not self._reserved[revision]:
                del self._reserved[revision]
        self._hold(slot)
        if self.disk is not None and source != self.disk.name:
            self._keep_on_disk(slot)
        return slot

    async def _reserve(self, size_bytes: int, make_room: MakeRoom) -> SlotWriter:
        """One at a time, in order: so nobody takes what was given up for another. While one waits
        for room, up to _ROOM_S, others wait behind it even where they would fit."""
        now = asyncio.get_running_loop().time
        async with self._reserving:
            end = now() + _ROOM_S
            while True:
                try:
                    return self.pool.reserve(size_bytes)
                except ResourceExhaustedError as error:
                    leaving = make_room(size_bytes) | {*self._disk_writes}
                    if not leaving or now() > end:
                        raise ResourceExhaustedError(error.field, error.message, 1.0) from None
                await asyncio.wait(leaving, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)

    # The disk

    def _keep_on_disk(self, slot: Slot) -> None:
        self.pool.pin(slot.revision)
        writing = asyncio.create_task(self._write_to_disk(slot))
        self._disk_writes[writing] = slot

        def written(task: "asyncio.Task[None]") -> None:
            del self._disk_writes[task]
            self.pool.unpin(slot)

        writing.add_done_callback(written)

    async def _write_to_disk(self, slot: Slot) -> None:
        disk = self.disk
        assert disk is not None
        try:
            await self._disk_calls.run(lambda: disk.keep(slot.revision, slot.view))
        except UnavailableError:  # the disk is slow; this one is not kept
            _log.debug("adapter revision %s is not kept on disk", slot.revision[:12])

    async def close(self) -> None:
        """Ends fetches; the pool keeps what it has."""
        tasks = [*(c.task for c in self._coming.values()), *self._disk_writes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
