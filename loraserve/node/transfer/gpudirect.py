"""Reads of peers' slots into a GPU's memory: proven by reading, then used."""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from loraserve.errors import FailedPreconditionError, InvalidArgumentError, LoraServeError
from loraserve.node.transfer.dry_run import TIMEOUT_S, Holder, Offered
from loraserve.node.transfer.facts import gpudirect_missing
from loraserve.node.transfer.in_node import InNodeReader
from loraserve.node.transfer.sidecar import TransferInfo, TransferSidecar
from loraserve.v1 import node_pb2

_log = logging.getLogger(__name__)

STAGING_BYTES = 256 << 20
PROOF_SIZES = (64 << 10, 16 << 20)
_TIMES = 5
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class DeviceRead:
    """Of `size_bytes` into device memory; shortest times of some. `to_host_seconds` is what it
    costs to bring the bytes to the host, where they are checked."""

    size_bytes: int
    seconds: float
    to_host_seconds: float
    transports: tuple[str, ...]


def open_reader(
    size_bytes: int, *, device: str = "cuda", host_memory: bool = False
) -> InNodeReader:
    """Device memory of so many bytes and a reader into it; blocks. `host_memory`: as InNodeReader.

    Raises FailedPreconditionError that says what is missing.
    """
    missing = [] if host_memory else gpudirect_missing()
    if missing:
        raise FailedPreconditionError("gpudirect", "; ".join(missing))
    try:
        from loraserve.engine.device_staging import DeviceStaging

        return InNodeReader(DeviceStaging(device, size_bytes), host_memory=host_memory)
    except ImportError as error:
        raise FailedPreconditionError("gpudirect", f"no engine: {error}") from None
    except FailedPreconditionError:
        raise
    except LoraServeError as error:
        raise FailedPreconditionError("gpudirect", str(error)) from None


async def read_to_device(reader: InNodeReader, offered: Sequence[Offered]) -> list[DeviceRead]:
    """Reads each of them some times. Raises what a read raises, and InvalidArgumentError where
    other bytes came than were offered."""
    reads = []
    for one in offered:
        host = memoryview(bytearray(one.size_bytes))
        seconds = to_host = float("inf")
        over: tuple[str, ...] = ()
        for _ in range(_TIMES):
            begun = time.perf_counter()
            over = await reader.read(one.slot, one.size_bytes, TIMEOUT_S)
            there = time.perf_counter()
            await asyncio.to_thread(reader.staging.copy_to_host, 0, host)
            seconds = min(seconds, there - begun)
            to_host = min(to_host, time.perf_counter() - there)
            if xxhash.xxh3_128_hexdigest(host) != one.digest:
                raise InvalidArgumentError("bytes", f"of {one.size_bytes}: not those offered")
        reads.append(DeviceRead(one.size_bytes, seconds, to_host, over))
    return reads


async def prove(reader: InNodeReader, sizes: Sequence[int] = PROOF_SIZES) -> list[DeviceRead]:
    """A sidecar of this machine offers, `reader` reads. Raises FailedPreconditionError: what did
    not work."""
    try:
        holder = await Holder.start(sizes)
        try:
            return await read_to_device(reader, await holder.offer(sizes))
        finally:
            await holder.close()
    except LoraServeError as error:
        raise FailedPreconditionError(
            "gpudirect", f"the dry run's read into device memory failed: {error}"
        ) from None


async def proven_reader(device: str, size_bytes: int = STAGING_BYTES) -> InNodeReader:
    """For a node. Raises FailedPreconditionError where the dry run does not succeed."""
    reader = await asyncio.to_thread(functools.partial(open_reader, size_bytes, device=device))
    reads = await prove(reader)
    _log.info(
        "gpudirect: %d bytes of device memory are read into over %s",
        *(size_bytes, ", ".join(reads[-1].transports) or "UCX"),
    )
    return reader


class DeviceReads:
    """A Transfer whose reads land in device memory and are copied to the host pool from there: what
    is served was checked, and the host does that. What is too large for the staging, and what comes
    while it is in use, is read by the sidecar. Event loop only."""

    def __init__(
        self,
        sidecar: TransferSidecar,
        reader: InNodeReader,
        pool_view: Callable[[int, int], memoryview],
    ) -> None:
        """`pool_view(offset, length)`: writable bytes of the arena."""
        self._sidecar = sidecar
        self._reader = reader
        self._pool_view = pool_view
        self._busy = False

    @property
    def info(self) -> TransferInfo | None:
        return self._sidecar.info

    def check_reachable(self, remote: node_pb2.RemoteSlot) -> None:
        """As TransferSidecar's."""
        self._sidecar.check_reachable(remote)

    async def export(self, offset: int, length: int) -> tuple[bytes, int]:
        return await self._sidecar.export(offset, length)

    async def withdraw(self, offset: int) -> None:
        await self._sidecar.withdraw(offset)

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
        """As TransferSidecar.read."""
        length = size_bytes - skip_bytes
        device = not (self._busy or self._reader.stuck or length > self._reader.staging.size_bytes)
        if device:
            self._busy = True
            try:
                await self._read(remote, size_bytes, local_offset, timeout_s, skip_bytes, arrived)
                return
            except FailedPreconditionError as error:  # a peer that only the sidecar reaches
                _log.debug("no read into device memory: %s", error)
            finally:
                self._busy = False
        await self._sidecar.read(
            remote, size_bytes, local_offset, timeout_s, skip_bytes=skip_bytes, arrived=arrived
        )

    async def _read(
        self,
        remote: node_pb2.RemoteSlot,
        size_bytes: int,
        local_offset: int,
        timeout_s: float,
        skip_bytes: int,
        arrived: Callable[[int], None] | None,
    ) -> None:
        await self._reader.read(remote, size_bytes, timeout_s, skip_bytes=skip_bytes)
        for at in range(0, size_bytes - skip_bytes, _PIECE_BYTES):
            piece = min(_PIECE_BYTES, size_bytes - skip_bytes - at)
            into = self._pool_view(local_offset + at, piece)
            copying = asyncio.ensure_future(
                asyncio.to_thread(self._reader.staging.copy_to_host, at, into)
            )
            try:
                await asyncio.shield(copying)
            except asyncio.CancelledError:
                await asyncio.wait([copying])
                raise
            if arrived is not None:
                arrived(piece)
