"""PeerService: this node's copies, for other nodes to read."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from loraserve.errors import (
    InvalidArgumentError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from loraserve.node.convert import seconds
from loraserve.node.peers.copy_messages import encode
from loraserve.node.peers.exports import Exports
from loraserve.node.pool.slots import MAX_LEASE_S, HostPool, Slot
from loraserve.security.access import current_identity
from loraserve.security.identity import Identity, check_revision
from loraserve.v1 import node_pb2
from loraserve.wire_errors import typed_errors

_log = logging.getLogger(__name__)

SERVICE = node_pb2.DESCRIPTOR.services_by_name["PeerService"].full_name
DEFAULT_LEASE_S = 60.0
# Copies that are read over gRPC at a time. Each costs the node a core for as long as it runs; who
# comes too many finds another holder, or the store.
MAX_READS = 8
# Of a message: what a message costs beyond its bytes is then little of it.
MESSAGE_BYTES = 2 << 20
# A reader that takes nothing for so long is given up.
READER_STALL_S = 15.0
# What a lease and a stream may take beyond twice the time that the bytes should.
SLACK_S = 10.0
_RETRY_AFTER_S = 0.5


class PeerServicer:
    """On the event loop. Readers that vanish cost nothing but the rest of their lease."""

    def __init__(
        self,
        pool: Callable[[], HostPool],
        exports: Callable[[], Exports | None] = lambda: None,
        deadline_s: Callable[[int], float] = lambda size_bytes: MAX_LEASE_S,
    ) -> None:
        """`pool` raises UnavailableError while the node has none yet. `deadline_s`: what a read of
        so many bytes should take at most; twice that and SLACK_S it is given."""
        self._pool = pool
        self._exports = exports
        self._deadline_s = deadline_s
        self._reads = 0
        self._expiry: asyncio.TimerHandle | None = None

    def _longest_s(self, size_bytes: int) -> float:
        return min(MAX_LEASE_S, 2 * self._deadline_s(size_bytes) + SLACK_S)

    @typed_errors
    async def LeaseCopy(
        self, request: node_pb2.LeaseCopyRequest, context: Any
    ) -> node_pb2.LeaseCopyResponse:
        ttl_s = seconds(request.ttl) if request.HasField("ttl") else DEFAULT_LEASE_S
        if not ttl_s > 0:
            raise InvalidArgumentError("ttl", f"{ttl_s:g} s, over 0")
        pool, exports = self._pool(), self._exports()
        revision = check_revision("revision", request.revision)
        slot = pool.find(revision)
        ttl_s = min(ttl_s, self._longest_s(slot.size_bytes) if slot else MAX_LEASE_S)
        lease = pool.lease(revision, ttl_s, _peer_of(context))
        self._expire_later(pool)
        try:
            remote = await exports.remote_slot(lease.slot) if exports else None
        except BaseException:
            pool.release(lease.lease_id)
            raise
        answer = node_pb2.LeaseCopyResponse(
            lease_id=lease.lease_id, ttl=Duration(), size_bytes=lease.slot.size_bytes, slot=remote
        )
        answer.ttl.FromMilliseconds(round(ttl_s * 1000))
        return answer

    def _expire_later(self, pool: HostPool) -> None:
        """Memory under a lease that lapses goes back, though nobody asks for it."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        left_s = pool.next_expiry_s
        if left_s is not None:
            loop = asyncio.get_running_loop()
            self._expiry = loop.call_later(left_s + 0.01, self._expire, pool)

    def _expire(self, pool: HostPool) -> None:
        pool.expire()
        self._expire_later(pool)

    @typed_errors
    async def ReleaseCopy(
        self, request: node_pb2.ReleaseCopyRequest, context: Any
    ) -> node_pb2.ReleaseCopyResponse:
        self._pool().release(request.lease_id)
        return node_pb2.ReleaseCopyResponse()

    @typed_errors
    async def ReadCopy(self, request: node_pb2.ReadCopyRequest, context: Any) -> None:
        """Writes serialized messages."""
        pool = self._pool()
        with self._reading(), _pinned(pool, check_revision("revision", request.revision)) as slot:
            if request.offset_bytes > slot.size_bytes:
                raise InvalidArgumentError(
                    "offset_bytes", f"{request.offset_bytes}, the copy has {slot.size_bytes}"
                )
            now = asyncio.get_running_loop().time
            longest_s = self._longest_s(slot.size_bytes)
            end_s = now() + longest_s
            for message in _messages(slot, request.offset_bytes):
                left_s = end_s - now()
                try:
                    await asyncio.wait_for(context.write(message), min(READER_STALL_S, left_s))
                except asyncio.TimeoutError:
                    why = f"has taken nothing for {READER_STALL_S:g} s"
                    if left_s < READER_STALL_S:
                        why = f"has not taken the copy within {longest_s:.1f} s"
                    raise UnavailableError("peer", why) from None
                except grpc.aio.BaseError:  # the reader has gone
                    return

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        if self._reads >= MAX_READS:
            raise ResourceExhaustedError("reads", f"{self._reads} copies are read", _RETRY_AFTER_S)
        self._reads += 1
        try:
            yield
        finally:
            self._reads -= 1


def _peer_of(context: Any) -> tuple[Identity | None, str]:
    """Nodes may share one key: they are told apart by their addresses, too."""
    identity = None
    with contextlib.suppress(UnauthenticatedError):  # served without a gate, by a test
        identity = current_identity()
    return identity, context.peer().rpartition(":")[0]


@contextlib.contextmanager
def _pinned(pool: HostPool, revision: str) -> Iterator[Slot]:
    slot = pool.pin(revision)
    try:
        yield slot
    finally:
        pool.unpin(slot)


def _messages(slot: Slot, offset: int) -> Iterator[bytes]:
    """At least one, since the first tells the size."""
    size: int | None = slot.size_bytes
    while True:
        end = min(offset + MESSAGE_BYTES, slot.size_bytes)
        yield encode(slot.view[offset:end], size)
        offset, size = end, None
        if end == slot.size_bytes:
            return


def add_to_server(servicer: PeerServicer, server: grpc.aio.Server) -> None:
    """As the generated function would, but for the serializer of ReadCopy, whose messages are
    serialized already."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "LeaseCopy": grpc.unary_unary_rpc_method_handler(
            servicer.LeaseCopy,
            node_pb2.LeaseCopyRequest.FromString,
            node_pb2.LeaseCopyResponse.SerializeToString,
        ),
        "ReleaseCopy": grpc.unary_unary_rpc_method_handler(
            servicer.ReleaseCopy,
            node_pb2.ReleaseCopyRequest.FromString,
            node_pb2.ReleaseCopyResponse.SerializeToString,
        ),
        "ReadCopy": grpc.unary_stream_rpc_method_handler(
            servicer.ReadCopy, node_pb2.ReadCopyRequest.FromString, None
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
