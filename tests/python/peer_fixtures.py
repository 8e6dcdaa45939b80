"""A node's host pool with its PeerService, a sidecar in memory, and a reader of both."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from pool_fixtures import header_of, large, load_of

from loraserve.errors import FailedPreconditionError, LoraServeError
from loraserve.node.load_info import Peer
from loraserve.node.peers.channels import PeerChannels
from loraserve.node.peers.exports import Exports
from loraserve.node.peers.servicer import PeerServicer, add_to_server
from loraserve.node.peers.source import PeerSource
from loraserve.node.pool.arena import HostArena
from loraserve.node.pool.checked_writer import CheckedWriter
from loraserve.node.pool.slots import HostPool
from loraserve.node.transfer import TransferInfo, TransferSidecar
from loraserve.v1 import node_pb2, node_pb2_grpc
from loraserve.v1.node_pb2 import ReadCopyRequest
from loraserve.wire import SERVER_OPTIONS, bind, dial


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


INFO = TransferInfo("1.21.0", "here", ("cma",), b"worker")


class FakeTransfer:
    """A sidecar that notes what it is asked for."""

    def __init__(self) -> None:
        self.info: TransferInfo | None = INFO
        self.exported: list[tuple[int, int]] = []
        self.withdrawn: list[int] = []
        self.error: LoraServeError | None = None
        self.hangs = self.dies = False
        self.exporting = 0
        self.reads: list[node_pb2.RemoteSlot] = []
        self.on_read: Callable[..., Awaitable[None]] | None = None

    async def export(self, offset: int, length: int) -> tuple[bytes, int]:
        self.exported.append((offset, length))
        self.exporting += 1
        while self.hangs:
            # Who cancels it waits for the sidecar all the same.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.005)
        self.exporting -= 1
        if self.error is not None:
            raise self.error
        if self.dies:
            self.info = replace(INFO, worker_address=b"another")
        return b"rkey", 4096 + offset

    async def withdraw(self, offset: int) -> None:
        self.withdrawn.append(offset)

    def check_reachable(self, remote: node_pb2.RemoteSlot) -> None:
        if (remote.ucx_version, remote.host) != (INFO.ucx_version, INFO.host):
            raise FailedPreconditionError("transports", "none leads there")

    async def read(
        self,
        remote: node_pb2.RemoteSlot,
        size_bytes: int,
        local_offset: int,
        timeout_s: float,
        *,
        skip_bytes: int = 0,
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        self.reads.append(remote)
        if self.on_read is not None:
            await self.on_read(local_offset, skip_bytes, arrived)


class Holder:
    """A node's pool and its PeerService."""

    def __init__(self, pool: HostPool, clock: Clock, stub: Any, address: str) -> None:
        self.pool, self.clock, self.stub = pool, clock, stub
        self.peer = Peer("holder", address)
        self.sidecar: TransferSidecar

    def put(self, revision: str, data: bytes) -> None:
        writer = self.pool.reserve(len(data))
        writer.view[:] = data
        writer.seal(revision)

    def is_empty(self) -> bool:
        return self.pool.bytes_free == self.pool.capacity_bytes

    async def read(self, revision: str, offset: int = 0) -> tuple[bytes, list[Any]]:
        request = ReadCopyRequest(revision=revision, offset_bytes=offset)
        messages = [m async for m in self.stub.ReadCopy(request)]
        return b"".join(m.chunk for m in messages), messages


@contextlib.asynccontextmanager
async def holding(
    max_leases: int = 8,
    transfer: FakeTransfer | None = None,
    address: str = "127.0.0.1:0",
    credentials: grpc.ServerCredentials | None = None,
    sidecar: Callable[[HostArena], Awaitable[TransferSidecar]] | None = None,
    **limits: Callable[[int], float],
) -> AsyncIterator[Holder]:
    clock = Clock()
    pool = HostPool(HostArena(64 << 20, prefault_bytes=0), clock, max_leases)
    real = await sidecar(pool.arena) if sidecar else None
    given = transfer or real
    exports = Exports(pool, given) if given else None
    server = grpc.aio.server(options=SERVER_OPTIONS)
    add_to_server(PeerServicer(lambda: pool, lambda: exports, **limits), server)
    address = bind(server, address, credentials)
    await server.start()
    try:
        async with dial(address) as channel:
            holder = Holder(pool, clock, node_pb2_grpc.PeerServiceStub(channel), address)
            if real is not None:
                holder.sidecar = real
            yield holder
    finally:
        if real is not None:
            await real.close()
        await server.stop(0)


BLOB = large(chunks=4)
HEADER = header_of(BLOB)
REVISION = HEADER.revision
BEGIN = HEADER.header_bytes


class Reader:
    """A node that reads BLOB from peers. `pool` has room for it three times."""

    def __init__(
        self, transfer: FakeTransfer | None = None, deadline_s: float = 60.0, **channels: Any
    ) -> None:
        self.pool = HostPool(HostArena(3 * len(BLOB) + (1 << 20), prefault_bytes=0), Clock())
        self.reads: list[tuple[str, int]] = []
        self.deadline_s = deadline_s
        self.channels = PeerChannels(**channels)
        self.source = PeerSource(
            *("reader", self.channels, lambda size_bytes: self.deadline_s),
            transfer=transfer,
            on_read=lambda transport, size, seconds: self.reads.append((transport, size)),
        )

    async def read(self, *peers: Peer) -> bytes:
        """What is in the slot in the end, all of it checked."""
        slot = self.pool.reserve(HEADER.size_bytes)
        slot.view[:] = bytes(len(slot.view))
        slot.view[: HEADER.header_bytes] = BLOB[: HEADER.header_bytes]
        writer = CheckedWriter(slot, HEADER, "xxh3")
        try:
            await self.source.read_into(load_of(BLOB, peers=peers), HEADER, writer)
            writer.finish()
            return bytes(slot.view)
        finally:
            writer.revoke()
            slot.abandon()


async def failure(reader: Reader, *peers: Peer) -> LoraServeError:
    with pytest.raises(LoraServeError) as caught:
        await reader.read(*peers)
    return caught.value


def flipped(at: int) -> bytes:
    data = bytearray(BLOB[BEGIN:])
    data[at] ^= 1
    return bytes(data)


def released(holder: Any) -> Callable[[], bool]:
    return lambda: holder.pool.stats().leases == 0
