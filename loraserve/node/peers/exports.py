"""Slots of the host pool that peers may read one-sided, by way of the sidecar."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from loraserve.errors import LoraServeError
from loraserve.node.pool.slots import SLOT_HEADER_BYTES, HostPool, Slot
from loraserve.node.transfer import TransferInfo
from loraserve.v1 import node_pb2

_log = logging.getLogger(__name__)


class Transfer(Protocol):
    """Of TransferSidecar, what reads between nodes need."""

    @property
    def info(self) -> TransferInfo | None: ...

    async def export(self, offset: int, length: int) -> tuple[bytes, int]: ...

    async def withdraw(self, offset: int) -> None: ...

    def check_reachable(self, remote: node_pb2.RemoteSlot) -> None: ...

    async def read(
        self,
        remote: node_pb2.RemoteSlot,
        size_bytes: int,
        local_offset: int,
        timeout_s: float,
        *,
        skip_bytes: int = 0,
        arrived: Callable[[int], None] | None = None,
    ) -> None: ...


class Exports:
    """What the sidecar has exported. A slot is exported when it is first leased, and withdrawn when
    its memory goes back to the pool. Event loop only."""

    # Of a LeaseCopy, whose caller waits for twice that: it shall have an answer, and read a stream.
    EXPORT_TIMEOUT_S = 1.0

    def __init__(self, pool: HostPool, transfer: Transfer) -> None:
        self._transfer = transfer
        self._exported: set[Slot] = set()
        self._exporting: dict[Slot, asyncio.Task[tuple[bytes, int]]] = {}
        self._late: set[Slot] = set()  # of those
        self._tasks: set[asyncio.Future[None]] = set()
        pool.on_free = self._freed

    async def remote_slot(self, slot: Slot) -> node_pb2.RemoteSlot | None:
        """What a peer needs to read a slot that it has leased; None where the sidecar does not
        export it (now)."""
        info = self._transfer.info
        if info is None or not info.transports:
            return None
        if self._late:  # the sidecar hangs: it answers what it was asked, or is killed
            return None
        exporting = self._export(slot)
        # Not cancelled: that would wait for the sidecar, too.
        await asyncio.wait({exporting}, timeout=self.EXPORT_TIMEOUT_S)
        if not exporting.done():
            if self._exporting.get(slot) is exporting:
                self._late.add(slot)
            _log.warning("exporting %s takes too long", slot.revision[:12])
            return None
        try:
            rkey, address = exporting.result()
        except LoraServeError as error:
            _log.warning("exporting %s: %s", slot.revision[:12], error)
            return None
        if self._transfer.info != info:  # another life of it, which has exported nothing
            return None
        return node_pb2.RemoteSlot(
            ucx_version=info.ucx_version,
            worker_address=info.worker_address,
            rkey=rkey,
            address=address,
            header_bytes=SLOT_HEADER_BYTES,
            generation=slot.generation,
            host=info.host,
        )

    def _export(self, slot: Slot) -> "asyncio.Task[tuple[bytes, int]]":
        """One for all who lease the slot at a time, whoever of them goes."""
        self._exported.add(slot)
        exporting = self._exporting.get(slot)
        if exporting is None:

            async def export() -> tuple[bytes, int]:
                return await self._transfer.export(slot.offset, SLOT_HEADER_BYTES + slot.size_bytes)

            def ended(task: "asyncio.Task[tuple[bytes, int]]") -> None:
                del self._exporting[slot]
                self._late.discard(slot)
                if not task.cancelled():
                    task.exception()  # whoever waits has it

            exporting = self._exporting[slot] = asyncio.create_task(export())
            exporting.add_done_callback(ended)
        return exporting

    def _freed(self, slot: Slot) -> None:
        if slot in self._exported:
            self._exported.discard(slot)
            withdrawing = asyncio.ensure_future(self._withdraw(slot.offset))
            self._tasks.add(withdrawing)
            withdrawing.add_done_callback(self._tasks.discard)

    async def _withdraw(self, offset: int) -> None:
        with contextlib.suppress(LoraServeError):  # it went with the sidecar
            await self._transfer.withdraw(offset)
