"""Reads that prove a transport instead of listing it: between two sidecars of this machine, or from
another machine's offer."""

import base64
import json
import os
import platform
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from loraserve.errors import InvalidArgumentError, UnavailableError
from loraserve.node.model import cpu_name
from loraserve.node.pool.arena import HostArena
from loraserve.node.pool.slots import SLOT_HEADER_BYTES, SLOT_MAGIC, slot_bytes
from loraserve.node.transfer.facts import gpudirect_missing, rdma_devices, rdma_missing
from loraserve.node.transfer.sidecar import TransferInfo, TransferSidecar
from loraserve.v1 import node_pb2

OFFER_SIZES = (64 << 10, 1 << 20, 16 << 20, 64 << 20)
_VERSION = 1
_GENERATION = 1
_TIMES = 5
TIMEOUT_S = 30.0
_BLOBS = ("worker_address", "rkey")
_FIELDS = ("ucx_version", "address", "header_bytes", "generation", "host")


@dataclass(frozen=True)
class Read:
    """Of `size_bytes`, verified; the shortest of some."""

    size_bytes: int
    seconds: float
    transports: tuple[str, ...]
    """Of the endpoint it went over; empty where UCX does not say."""

    @property
    def gb_per_s(self) -> float:
        return self.size_bytes / self.seconds / 1e9


@dataclass(frozen=True)
class Offered:
    slot: node_pb2.RemoteSlot
    size_bytes: int
    digest: str
    """xxh3-128 of the bytes."""


class Holder:
    """An arena with a slot of random bytes for each size, and the sidecar that exports them."""

    def __init__(self, arena: HostArena, sidecar: TransferSidecar) -> None:
        self.arena = arena
        self.sidecar = sidecar

    @classmethod
    async def start(cls, sizes: Sequence[int]) -> "Holder":
        """Raises what TransferSidecar.start does."""
        arena = HostArena(sum(slot_bytes(size) for size in sizes))
        try:
            sidecar = await TransferSidecar.start(arena.fd, arena.capacity_bytes)
        except BaseException:
            arena.close()
            raise
        return cls(arena, sidecar)

    async def offer(self, sizes: Sequence[int]) -> list[Offered]:
        info = _info(self.sidecar)
        offered, offset = [], 0
        block = os.urandom(1 << 20)
        for size in sizes:
            header = struct.pack("<8sQQ40x", SLOT_MAGIC, _GENERATION, size)
            self.arena.view(offset, SLOT_HEADER_BYTES)[:] = header
            view = self.arena.view(offset + SLOT_HEADER_BYTES, size)
            for at in range(0, size, len(block)):
                part = view[at : at + len(block)]
                part[:] = block[: len(part)]
            rkey, address = await self.sidecar.export(offset, SLOT_HEADER_BYTES + size)
            slot = node_pb2.RemoteSlot(
                ucx_version=info.ucx_version,
                worker_address=info.worker_address,
                rkey=rkey,
                address=address,
                header_bytes=SLOT_HEADER_BYTES,
                generation=_GENERATION,
                host=info.host,
            )
            offered.append(Offered(slot, size, xxhash.xxh3_128_hexdigest(view)))
            offset += slot_bytes(size)
        return offered

    async def close(self) -> None:
        await self.sidecar.close()
        self.arena.close()


def _info(sidecar: TransferSidecar) -> TransferInfo:
    if sidecar.info is None:
        raise UnavailableError("transfer", "the sidecar is not there")
    return sidecar.info


async def read_offer(offered: Sequence[Offered]) -> tuple[TransferInfo, list[Read]]:
    """Reads each of them some times. Raises what a read raises, and InvalidArgumentError where
    other bytes came than were offered."""
    arena = HostArena(max(one.size_bytes for one in offered))
    try:
        sidecar = await TransferSidecar.start(arena.fd, arena.capacity_bytes)
        try:
            reads = []
            for one in offered:
                shortest = float("inf")
                for _ in range(_TIMES):
                    begun = time.perf_counter()
                    await sidecar.read(one.slot, one.size_bytes, 0, TIMEOUT_S)
                    shortest = min(shortest, time.perf_counter() - begun)
                digest = xxhash.xxh3_128_hexdigest(arena.view(0, one.size_bytes))
                if digest != one.digest:
                    raise InvalidArgumentError("bytes", f"of {one.size_bytes}: not those offered")
                reads.append(Read(one.size_bytes, shortest, sidecar.last_transports))
            return _info(sidecar), reads
        finally:
            await sidecar.close()
    finally:
        arena.close()


async def dry_run(sizes: Sequence[int] = (64 << 10, 16 << 20)) -> tuple[TransferInfo, list[Read]]:
    """Between two sidecars of this machine. Raises LoraServeError types."""
    holder = await Holder.start(sizes)
    try:
        return await read_offer(await holder.offer(sizes))
    finally:
        await holder.close()


def machine() -> dict[str, Any]:
    """Of an offer or a result: what explains its numbers."""
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "rdma_devices": rdma_devices(),
        "rdma_missing": rdma_missing(),
        "gpudirect_missing": gpudirect_missing(),
    }


def to_line(offered: Sequence[Offered]) -> str:
    """One line of JSON. A bearer secret: whoever has it may read the offer while it stands."""
    slots = []
    for one in offered:
        fields: dict[str, Any] = {name: getattr(one.slot, name) for name in _FIELDS}
        for name in _BLOBS:
            fields[name] = base64.b64encode(getattr(one.slot, name)).decode()
        slots.append({"slot": fields, "size_bytes": one.size_bytes, "xxh3_128": one.digest})
    return json.dumps({"loraserve_offer": _VERSION, "slots": slots, "machine": machine()})


def from_line(line: str) -> tuple[list[Offered], dict[str, Any]]:
    """The slots, and the machine that offers them. Raises InvalidArgumentError."""
    try:
        document = json.loads(line)
        if document["loraserve_offer"] != _VERSION:
            raise ValueError(f"version {document['loraserve_offer']}")
        offered = []
        for entry in document["slots"]:
            fields = dict(entry["slot"])
            for name in _BLOBS:
                fields[name] = base64.b64decode(fields[name], validate=True)
            size, digest = int(entry["size_bytes"]), str(entry["xxh3_128"])
            if not 0 < size <= 1 << 32:
                raise ValueError(f"size_bytes {size}")
            offered.append(Offered(node_pb2.RemoteSlot(**fields), size, digest))
        if not offered:
            raise ValueError("no slots")
        return offered, dict(document["machine"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError("read-from", f"not an offer of the doctor: {error!r}") from None
