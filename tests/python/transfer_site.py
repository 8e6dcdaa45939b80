"""Sidecars with arenas of their own, and slots in them."""

import asyncio
import contextlib
import fcntl
import mmap
import os
import signal
import struct
import sysconfig
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loraserve.errors import FailedPreconditionError
from loraserve.node.transfer import Timing, TransferSidecar
from loraserve.node.transfer.program import find_program
from loraserve.v1 import node_pb2

SLOT_HEADER = struct.Struct("<8sQQ40x")
OVER_TCP = Path(sysconfig.get_path("scripts")) / "transfer_over_tcp"
# Waits of a machine with two busy cores; nothing waits so long where all is well.
PATIENCE_S = 60.0
QUICK = Timing(ping_interval_s=0.2, ping_timeout_s=5.0, first_backoff_s=0.05)


def require_sidecar() -> Path:
    """The program; the test is skipped where it was not built."""
    program = find_program()
    if program is None:
        pytest.skip("loraserve-transfer was not built: no UCX and ucxx (pip install libucxx-cu13)")
    return program


def run(test: Callable[[], Awaitable[None]]) -> None:
    require_sidecar()
    asyncio.run(asyncio.wait_for(test(), 2 * PATIENCE_S))  # type: ignore[arg-type]


class Arena:
    """As the host pool's: a memory file that does not shrink."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.fd = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, capacity_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.memory = mmap.mmap(self.fd, capacity_bytes)

    def write_slot(self, offset: int, generation: int, packed: bytes) -> None:
        SLOT_HEADER.pack_into(self.memory, offset, b"LORASLOT", generation, len(packed))
        start = offset + SLOT_HEADER.size
        self.memory[start : start + len(packed)] = packed

    def set_generation(self, offset: int, generation: int) -> None:
        struct.pack_into("<Q", self.memory, offset + 8, generation)

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


def noise(size_bytes: int) -> bytes:
    block = os.urandom(min(size_bytes, 1 << 20))
    return (block * (size_bytes // len(block) + 1))[:size_bytes]


class Site:
    """A sidecar and its arena."""

    def __init__(self, arena: Arena, sidecar: TransferSidecar) -> None:
        self.arena = arena
        self.sidecar = sidecar

    @property
    def pid(self) -> int:
        assert self.sidecar.pid is not None
        return self.sidecar.pid

    async def lease(
        self, packed: bytes, generation: int = 7, offset: int = 0
    ) -> node_pb2.RemoteSlot:
        """A slot with these bytes, as LeaseCopy describes it."""
        self.arena.write_slot(offset, generation, packed)
        rkey, address = await self.sidecar.export(offset, SLOT_HEADER.size + len(packed))
        info = self.sidecar.info
        assert info is not None
        return node_pb2.RemoteSlot(
            ucx_version=info.ucx_version,
            worker_address=info.worker_address,
            rkey=rkey,
            address=address,
            header_bytes=SLOT_HEADER.size,
            generation=generation,
            host=info.host,
        )

    async def read(self, slot: node_pb2.RemoteSlot, size_bytes: int) -> None:
        await self.sidecar.read(slot, size_bytes, 0, PATIENCE_S)

    async def reads(self, slot: node_pb2.RemoteSlot, packed: bytes) -> bool:
        """Whether a read of the slot brings these bytes."""
        await self.read(slot, len(packed))
        return self.holds(packed)

    def holds(self, packed: bytes, offset: int = 0) -> bool:
        # A truth value: pytest would spell out both sides of a comparison.
        return self.arena.memory[offset : offset + len(packed)] == packed

    async def back(self, pid: int) -> None:
        """Waits until a life after that of `pid` is there."""
        while self.sidecar.pid in (None, pid):
            await asyncio.sleep(0.01)


async def stopped_halfway(
    reader: Site, slot: node_pb2.RemoteSlot, packed: bytes
) -> "asyncio.Task[None]":
    """A read of the slot to offset 0 that stands still in the middle, its sidecar stopped: the
    first bytes have come, and the last have not. Until then the sidecar goes on by moments; where
    one was long enough for the whole read, another read begins, and moments are shorter."""
    memory, pid, tail = reader.arena.memory, reader.pid, len(packed) - 64
    moment_s, end = 0.001, time.monotonic() + PATIENCE_S
    while True:
        memory[:64], memory[tail : tail + 64] = bytes(64), bytes(64)
        _stop(pid)
        read = asyncio.create_task(reader.sidecar.read(slot, len(packed), 0, PATIENCE_S))
        await asyncio.sleep(0)  # now the request is on its way
        while not reader.holds(packed[:64]):
            assert time.monotonic() < end, "no read begins"
            os.kill(pid, signal.SIGCONT)
            time.sleep(moment_s)
            _stop(pid)
        if not reader.holds(packed[tail:], tail):
            return read
        os.kill(pid, signal.SIGCONT)
        await read
        moment_s /= 2


def _stop(pid: int) -> None:
    """Returns when the process stands still."""
    os.kill(pid, signal.SIGSTOP)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        pass


@contextlib.asynccontextmanager
async def site(capacity_bytes: int = 1 << 20, timing: Timing | None = None) -> AsyncIterator[Site]:
    """The test is skipped where no process may read another's memory."""
    arena = Arena(capacity_bytes)
    try:
        try:
            sidecar = await TransferSidecar.start(
                arena.fd, capacity_bytes, timing=timing or replace(Timing(), ping_interval_s=60.0)
            )
        except FailedPreconditionError as error:
            pytest.skip(f"UCX has no one-sided transport here: {error}")
        try:
            yield Site(arena, sidecar)
        finally:
            await sidecar.close()
    finally:
        arena.close()


@contextlib.asynccontextmanager
async def pair(
    capacity_bytes: int = 1 << 20, timing: Timing | None = None
) -> AsyncIterator[tuple[Site, Site]]:
    """(holder, reader)."""
    async with contextlib.AsyncExitStack() as stack:
        sites = [stack.enter_async_context(site(capacity_bytes, timing)) for _ in range(2)]
        holder, reader = await asyncio.gather(*sites)
        yield holder, reader


@contextlib.asynccontextmanager
async def over_tcp(capacity_bytes: int) -> AsyncIterator[Site]:
    """The same program over the transport that the product never uses, on loopback."""
    require_sidecar()
    if not OVER_TCP.exists():
        pytest.skip("transfer_over_tcp was not built: LORASERVE_BUILD_TESTS is off")
    arena = Arena(capacity_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_NET_DEVICES", "lo")
        sidecar = await TransferSidecar.start(
            arena.fd, capacity_bytes, program=OVER_TCP, timing=Timing(ping_interval_s=PATIENCE_S)
        )
    with pytest.MonkeyPatch.context() as patch:
        # It says, rightly, that it has no one-sided transport.
        patch.setattr(sidecar, "check_reachable", lambda remote: None)
        try:
            yield Site(arena, sidecar)
        finally:
            await sidecar.close()
            arena.close()
