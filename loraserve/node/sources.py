"""Where a node gets the bytes of a packed adapter: what a source is, the store and the controller.

Headers are asked of trusted sources, and must hash to the revision in any case; data may come from
anyone, since every chunk is checked against the header.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import grpc
import grpc.aio

from loraserve.checkpoint.durable_store import DurableStore
from loraserve.checkpoint.packed_header import PackedHeader, missing_header_bytes
from loraserve.errors import InvalidCheckpointError, UnavailableError
from loraserve.node.blocking import BlockingCalls
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.pool.checked_writer import CheckedWriter
from loraserve.v1 import adapter_pb2, adapter_pb2_grpc
from loraserve.wire_errors import from_rpc_error

# Holds the header of all but the largest adapters, and all of small ones.
START_BYTES = 256 << 10
# Reads of a store that hangs, each in a thread of its own, until it is not asked any more.
_MAX_STORE_CALLS = 32


class HeaderSource(Protocol):
    """`name` is for logs and metrics."""

    name: str

    async def read_start(self, load: AdapterLoadInfo) -> bytes:
        """The whole header, and possibly bytes after it; not yet checked. Raises NotFoundError,
        InvalidCheckpointError, UnavailableError. Who asks sets the deadline, and cancels."""


class AdapterSource(Protocol):
    """`name` is for logs and metrics: "peer", "disk", "store", "controller"."""

    name: str

    async def read_into(
        self, load: AdapterLoadInfo, header: PackedHeader, writer: CheckedWriter
    ) -> None:
        """Brings the bytes of the packed adapter that come after `header`, see CheckedWriter; who
        asks checks what is left to check. Raises NotFoundError, InvalidCheckpointError,
        UnavailableError and other LoraServeErrors. Who asks sets the deadline, and cancels: then
        connections are closed by force."""


class LastingSource(HeaderSource, AdapterSource, Protocol):
    """One that has every adapter of the cluster, and is trusted with headers."""


class StoreSource:
    """A durable store that this node reaches itself."""

    name = "store"

    def __init__(self, store: DurableStore) -> None:
        self._store = store
        self._calls = BlockingCalls(self.name, _MAX_STORE_CALLS)

    async def read_start(self, load: AdapterLoadInfo) -> bytes:
        revision = load.spec.revision

        def read() -> bytes:
            start = self._store.read_range(revision, 0, START_BYTES)
            missing = missing_header_bytes(start)
            if missing:
                start += self._store.read_range(revision, len(start), missing)
            return start

        try:
            return await self._calls.run(read)
        except OSError as error:
            raise UnavailableError(self.name, str(error)) from None

    async def read_into(
        self, load: AdapterLoadInfo, header: PackedHeader, writer: CheckedWriter
    ) -> None:
        revision = load.spec.revision

        def read() -> None:
            for block in self._store.read(revision, writer.position):
                writer.write(block)
            if writer.position != header.size_bytes:
                raise InvalidCheckpointError(
                    self.name, f"{revision} ends after {writer.position} of {header.size_bytes}"
                )

        try:
            await self._calls.run(read)
        except OSError as error:
            raise UnavailableError(self.name, str(error)) from None


class ControllerSource:
    """The controller's AdapterService.ReadAdapter, for nodes without a way to the store."""

    name = "controller"

    def __init__(self, channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]] = ()) -> None:
        self._stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        self._metadata = tuple(metadata)

    def _call(self, revision: str, offset: int) -> Any:
        request = adapter_pb2.ReadAdapterRequest(revision=revision, offset_bytes=offset)
        return self._stub.ReadAdapter(request, metadata=self._metadata)

    async def read_start(self, load: AdapterLoadInfo) -> bytes:
        call = self._call(load.spec.revision, 0)
        start = bytearray()
        try:
            while missing_header_bytes(start):
                message: Any = await call.read()
                if message is grpc.aio.EOF:
                    raise UnavailableError(self.name, f"ended after {len(start)} bytes")
                start += message.chunk
            return bytes(start)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    async def read_into(
        self, load: AdapterLoadInfo, header: PackedHeader, writer: CheckedWriter
    ) -> None:
        call = self._call(load.spec.revision, writer.position)
        try:
            while writer.position < header.size_bytes:
                message: Any = await call.read()
                if message is grpc.aio.EOF:
                    raise UnavailableError(
                        self.name, f"ended after {writer.position} of {header.size_bytes} bytes"
                    )
                writer.write(message.chunk)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()
