"""Where a node gets the bytes of a packed adapter, and how it checks them before use."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import grpc
import grpc.aio

from loraserve.checkpoint.durable_store import DurableStore
from loraserve.errors import (
    FailedPreconditionError,
    InvalidCheckpointError,
    LoraServeError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from loraserve.placement.types import AdapterSpec
from loraserve.v1 import adapter_pb2, adapter_pb2_grpc
from loraserve.wire_errors import from_rpc_error

_log = logging.getLogger(__name__)

# A source that gives nothing for so long is given up.
STALL_S = 30.0

# In memory it is not changed any more; a copy to say so in its type would take its size again.
Blob = Path | bytes | bytearray
T = TypeVar("T")


class Packed(Protocol):
    """A packed adapter whose bytes agree with its header."""

    @property
    def revision(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def max_rank(self) -> int: ...
    @property
    def base_name(self) -> str: ...


# Checks every chunk against the header. Blocks; raises InvalidCheckpointError.
PackedReader = Callable[[Blob], Packed]


def read_packed(blob: Blob) -> Packed:
    """The PackedReader of the product."""
    from loraserve.checkpoint.packed_adapter import open_packed, parse_packed

    return open_packed(blob) if isinstance(blob, Path) else parse_packed(blob)


class AdapterSource(Protocol):
    """`name` is for the log."""

    name: str

    async def fetch(self, revision: str, max_bytes: int) -> Blob:
        """The blob, not yet checked. Raises NotFoundError, ResourceExhaustedError where it has
        more than `max_bytes`, UnavailableError."""


async def _in_daemon_thread(call: Callable[[], T]) -> T:
    """As asyncio.to_thread; but a call that never returns takes no thread of the pool from others,
    and does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if done.done():  # nobody waits any more
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast(T, result))

    def run() -> None:
        result, failure = None, None
        try:
            result = call()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="store-read", daemon=True).start()
    return await done


class StoreSource:
    """A durable store that this node reaches itself. A local one is mapped, not copied."""

    name = "store"

    def __init__(self, store: DurableStore) -> None:
        self._store = store

    async def fetch(self, revision: str, max_bytes: int) -> Blob:
        try:
            return await asyncio.wait_for(
                _in_daemon_thread(lambda: self._read(revision, max_bytes)), 20 * STALL_S
            )
        except asyncio.TimeoutError:
            raise UnavailableError("store", f"took over {20 * STALL_S:g} s") from None
        except OSError as error:
            raise UnavailableError("store", str(error)) from None

    def _read(self, revision: str, max_bytes: int) -> Blob:
        size = self._store.size_bytes(revision)
        if size > max_bytes:
            raise _too_large(size, max_bytes)
        path = self._store.local_path(revision)
        if path is not None and os.access(path, os.R_OK):
            return path
        blob = bytearray()
        for block in self._store.read(revision):
            blob += block
            if len(blob) > max_bytes:
                raise _too_large(len(blob), max_bytes)
        return blob


class ControllerSource:
    """The controller's AdapterService.ReadAdapter, for nodes without a way to the store."""

    name = "controller"

    def __init__(self, channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]] = ()) -> None:
        self._stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        self._metadata = tuple(metadata)

    async def fetch(self, revision: str, max_bytes: int) -> Blob:
        call = self._stub.ReadAdapter(
            adapter_pb2.ReadAdapterRequest(revision=revision), metadata=self._metadata
        )
        blob = bytearray()
        size: int | None = None
        try:
            while True:
                message: Any = await asyncio.wait_for(call.read(), STALL_S)
                if message is grpc.aio.EOF:
                    break
                if size is None:
                    size = message.size_bytes
                    if size > max_bytes:
                        raise _too_large(size, max_bytes)
                blob += message.chunk
                if len(blob) > size:
                    raise InvalidCheckpointError("chunk", f"more than the {size} bytes announced")
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        except asyncio.TimeoutError:
            raise UnavailableError("controller", f"sent nothing for {STALL_S:g} s") from None
        finally:
            call.cancel()
        if size is None:
            raise UnavailableError("controller", "ended without a word")
        if len(blob) != size:
            raise UnavailableError("controller", f"ended after {len(blob)} of {size} bytes")
        return blob


def _too_large(size: int, max_bytes: int) -> ResourceExhaustedError:
    return ResourceExhaustedError("adapter", f"{size} bytes, over the {max_bytes} expected")


class AdapterFetch:
    """Asks the sources in order; the first blob that stands every check is taken."""

    def __init__(
        self, sources: Sequence[AdapterSource], max_bytes: int, read: PackedReader = read_packed
    ) -> None:
        """`max_bytes` bounds an adapter whose size nobody told."""
        self._sources = tuple(sources)
        self._max_bytes = max_bytes
        self._read = read

    async def fetch(self, spec: AdapterSpec) -> Packed:
        """Raises the error of the last source that has the revision."""
        failure: LoraServeError | None = None
        for source in self._sources:
            try:
                blob = await source.fetch(spec.revision, spec.size_bytes or self._max_bytes)
                packed = await asyncio.to_thread(self._read, blob)
                _check(spec, packed)
                return packed
            except NotFoundError as error:
                failure = failure or error
            except LoraServeError as error:
                failure = error
                _log.warning("adapter %s: %s cannot give it: %s", spec.adapter, source.name, error)
            except Exception:  # of a file system's driver; the next source may do better
                failure = UnavailableError(source.name, "failed; the node's log says why")
                _log.exception("adapter %s: %s failed", spec.adapter, source.name)
        raise failure or NotFoundError("adapter", "this node has no source of adapters")


def _check(spec: AdapterSpec, packed: Packed) -> None:
    """What was asked for is what came: a source is not trusted."""
    if packed.revision != spec.revision:
        raise InvalidCheckpointError(
            "revision", f"asked for {spec.revision}, the bytes are of {packed.revision}"
        )
    if spec.size_bytes and packed.size_bytes != spec.size_bytes:
        raise InvalidCheckpointError(
            "size_bytes", f"{packed.size_bytes}, announced were {spec.size_bytes}"
        )
    if spec.max_rank and packed.max_rank != spec.max_rank:
        raise FailedPreconditionError(
            "max_rank", f"{packed.max_rank}, announced was {spec.max_rank}"
        )
