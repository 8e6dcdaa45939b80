"""Reads packed adapters from nodes that hold them: one-sided through the sidecar where both ends
have a transport for it, else as a stream over gRPC.

A peer is not trusted: every chunk is checked against the header, which came from elsewhere. What
goes wrong with it ends the attempt with a typed error, and the fetch goes on to the next source.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from loraserve.background import in_background
from loraserve.checkpoint.packed_header import PackedHeader
from loraserve.errors import (
    FailedPreconditionError,
    InvalidCheckpointError,
    NotFoundError,
    UnavailableError,
)
from loraserve.node.blocking import BlockingCalls
from loraserve.node.convert import seconds as granted
from loraserve.node.load_info import AdapterLoadInfo, Peer
from loraserve.node.peers.channels import PeerChannels
from loraserve.node.peers.copy_stream import STALL_S
from loraserve.node.peers.exports import Transfer
from loraserve.node.pool.checked_writer import CheckedWriter
from loraserve.v1 import node_pb2
from loraserve.wire_errors import from_rpc_error

_log = logging.getLogger(__name__)

# Streams at a time, those included whose thread hangs.
_MAX_STREAMS = 16
_CALL_TIMEOUT_S = 2.0

UCX, GRPC = "ucx", "grpc"

# Transport, bytes and seconds of a read that succeeded.
ReadObserver = Callable[[str, int, float], None]


class PeerSource:
    """An AdapterSource that reads from the first of `load.peers`. Event loop only."""

    name = "peer"

    def __init__(
        self,
        node_id: str,
        channels: PeerChannels,
        deadline_s: Callable[[int], float],
        *,
        transfer: Transfer | None = None,
        on_read: ReadObserver = lambda transport, size_bytes, seconds: None,
    ) -> None:
        """`deadline_s`: what a read of so many bytes may take. `transfer` None: over gRPC only."""
        self._node_id = node_id
        self._channels = channels
        self._deadline_s = deadline_s
        self._transfer = transfer
        self._on_read = on_read
        self._streams = BlockingCalls("peer", _MAX_STREAMS)
        self._releases: set[asyncio.Task[None]] = set()

    async def read_into(
        self, load: AdapterLoadInfo, header: PackedHeader, writer: CheckedWriter
    ) -> None:
        """See AdapterSource."""
        if not load.peers:
            raise NotFoundError("peer", "nobody is known to hold the adapter")
        peer, revision = load.peers[0], load.spec.revision
        if peer.node_id == self._node_id:
            raise NotFoundError("peer", "is this node itself")
        begin = time.monotonic()
        timeout_s = self._deadline_s(header.size_bytes)
        lease = await self._lease(peer, revision, timeout_s)
        # A holder may keep the copy for less than that.
        if lease.HasField("ttl"):
            timeout_s = min(timeout_s, max(0.001, granted(lease.ttl)))
        try:
            if lease.size_bytes != header.size_bytes:
                raise InvalidCheckpointError(
                    "size_bytes", f"{lease.size_bytes} at the peer, not {header.size_bytes}"
                )
            if await self._read_slot(peer, lease, writer, timeout_s):
                transport = UCX
            else:
                transport = GRPC
                await self._read_stream(peer, revision, writer, timeout_s)
        finally:
            self._release(peer, lease.lease_id)
        seconds = time.monotonic() - begin
        self._on_read(transport, header.size_bytes, seconds)
        _log.info(
            "adapter %s: %d bytes from %s over %s in %.3f s",
            *(load.spec.adapter, header.size_bytes, peer.node_id, transport, seconds),
        )

    # Leases

    async def _lease(self, peer: Peer, revision: str, timeout_s: float) -> Any:
        ttl = Duration()
        # A reader that is late must not read what took the slot's place.
        ttl.FromMilliseconds(round(1000 * (timeout_s + _CALL_TIMEOUT_S)))
        request = node_pb2.LeaseCopyRequest(revision=revision, ttl=ttl)
        with self._channels.stub(peer.address) as stub:
            try:
                return await stub.LeaseCopy(
                    request, timeout=_CALL_TIMEOUT_S, metadata=self._channels.metadata
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    self._channels.forget(peer.address)
                raise from_rpc_error(error) from None

    def _release(self, peer: Peer, lease_id: int) -> None:
        async def release() -> None:
            request = node_pb2.ReleaseCopyRequest(lease_id=lease_id)
            with (
                self._channels.stub(peer.address) as stub,
                contextlib.suppress(grpc.aio.AioRpcError),  # the lease ends by itself
            ):
                await stub.ReleaseCopy(
                    request, timeout=_CALL_TIMEOUT_S, metadata=self._channels.metadata
                )

        releasing = asyncio.create_task(release())
        self._releases.add(releasing)
        releasing.add_done_callback(self._releases.discard)

    # One-sided

    async def _read_slot(
        self, peer: Peer, lease: Any, writer: CheckedWriter, timeout_s: float
    ) -> bool:
        """False where no one-sided transport leads there: the bytes must come as a stream."""
        transfer = self._transfer
        if transfer is None or transfer.info is None or not lease.HasField("slot"):
            return False
        try:
            transfer.check_reachable(lease.slot)
            await _read_checked(transfer, lease.slot, writer, timeout_s)
        except FailedPreconditionError as error:
            _log.debug("no one-sided read from %s: %s", peer.node_id, error)
            return False
        return True

    # As a stream

    async def _read_stream(
        self, peer: Peer, revision: str, writer: CheckedWriter, timeout_s: float
    ) -> None:
        request = node_pb2.ReadCopyRequest(revision=revision, offset_bytes=writer.position)
        stream = self._channels.stream(peer.address, timeout_s + _CALL_TIMEOUT_S)
        reading = asyncio.ensure_future(self._streams.run(lambda: stream.read(request, writer)))
        end_s = time.monotonic() + timeout_s
        received = -1
        try:
            while not reading.done():
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    raise UnavailableError("peer", f"took over {timeout_s:.1f} s")
                if received == stream.received:
                    raise UnavailableError("peer", f"has sent nothing for {STALL_S:g} s")
                received = stream.received
                await asyncio.wait({reading}, timeout=min(STALL_S, left_s))
            await reading
        finally:
            if stream.close():
                await _ended({reading})
            else:
                reading.cancel()

    async def close(self) -> None:
        for task in self._releases:
            task.cancel()
        await self._channels.close()


async def _read_checked(
    transfer: Transfer, slot: node_pb2.RemoteSlot, writer: CheckedWriter, timeout_s: float
) -> None:
    """Chunks are checked in a thread while others are on their way. When this returns or raises,
    nothing writes to the slot and no thread checks it any more. FailedPreconditionError is raised
    only where nothing has arrived: then the slot is as it was, and may be filled otherwise."""
    skip = writer.position
    arrived: asyncio.Queue[int] = asyncio.Queue()
    some = False

    def on_arrived(n_bytes: int) -> None:
        nonlocal some
        some = True
        arrived.put_nowait(n_bytes)

    checking = asyncio.create_task(_check(writer, arrived, writer.size_bytes - skip))
    reading = asyncio.ensure_future(
        transfer.read(
            slot,
            writer.size_bytes,
            writer.data_offset + skip,
            timeout_s,
            skip_bytes=skip,
            arrived=on_arrived,
        )
    )
    try:
        await asyncio.wait({checking, reading}, return_when=asyncio.FIRST_EXCEPTION)
        if reading.done():
            reading.result()
        await checking
    except FailedPreconditionError as error:
        if some:
            raise UnavailableError("peer", f"gave up in the middle: {error}") from None
        raise
    finally:
        reading.cancel()
        checking.cancel()
        await _ended({reading, checking})


async def _check(writer: CheckedWriter, arrived: "asyncio.Queue[int]", missing: int) -> None:
    while missing > 0:
        n_bytes = await arrived.get()
        missing -= n_bytes
        # A thread cannot be cancelled: it is waited for.
        check = asyncio.ensure_future(in_background(functools.partial(writer.arrived, n_bytes)))
        try:
            await asyncio.shield(check)
        finally:
            await _ended({check})


async def _ended(tasks: "set[asyncio.Future[None]]") -> None:
    """Nothing writes to the slot any more when this returns, however often it is cancelled."""
    cancelled = False
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            cancelled = True
    for task in tasks:
        if not task.cancelled():
            task.exception()  # whoever it concerns has it
    if cancelled:
        raise asyncio.CancelledError
