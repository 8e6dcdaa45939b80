"""What makes a node a peer: its sidecar, what it exports, and its source of others' adapters."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from loraserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LoraServeError,
    UnavailableError,
)
from loraserve.node.peers.channels import PeerChannels
from loraserve.node.peers.exports import Exports, Transfer
from loraserve.node.peers.source import PeerSource, ReadObserver
from loraserve.node.pool.slots import HostPool
from loraserve.node.transfer import TransferSidecar
from loraserve.node.transfer.gpudirect import DeviceReads, proven_reader
from loraserve.node.transfer.in_node import InNodeReader
from loraserve.node.transfer.program import UCX_PREFIX
from loraserve.security import TlsFiles, channel_credentials, client_context
from loraserve.wire import bearer_metadata

_log = logging.getLogger(__name__)

AUTO, OFF, UCX = "auto", "off", "ucx"
TRANSFER_MODES = (AUTO, OFF, UCX)


@dataclass(frozen=True)
class PeerOptions:
    """`transfer`: AUTO reads one-sided where the sidecar runs and both ends can, UCX refuses to
    start without a sidecar, OFF has none. `key` and `tls` are for calls to other nodes; `tls` None:
    they are called without."""

    transfer: str = AUTO
    key: str | None = None
    tls: TlsFiles | None = None
    gpudirect: str | None = None
    """The device whose memory one-sided reads land in; None: they land in the host pool. Needs a
    sidecar, and a dry run that succeeds."""

    def __post_init__(self) -> None:
        if self.transfer not in TRANSFER_MODES:
            raise InvalidArgumentError("transfer", f"{self.transfer!r} is none of auto, off, ucx")
        if self.gpudirect is not None and self.transfer == OFF:
            raise InvalidArgumentError("gpudirect", "needs one-sided reads, and transfer is off")


class Peering:
    """Event loop only. `start`, then `close`."""

    def __init__(
        self,
        node_id: str,
        pool: HostPool,
        channels: PeerChannels,
        sidecar: TransferSidecar | None,
        deadline_s: Callable[[int], float],
        on_read: ReadObserver,
        reader: InNodeReader | None = None,
    ) -> None:
        """`reader`: of device memory, for reads to land in."""
        self.sidecar = sidecar
        self.exports = Exports(pool, sidecar) if sidecar else None
        transfer: Transfer | None = sidecar
        if sidecar is not None and reader is not None:
            transfer = DeviceReads(sidecar, reader, pool.arena.view)
        self.source = PeerSource(node_id, channels, deadline_s, transfer=transfer, on_read=on_read)

    @classmethod
    async def start(
        cls,
        node_id: str,
        pool: HostPool,
        options: PeerOptions,
        deadline_s: Callable[[int], float],
        on_read: ReadObserver,
    ) -> "Peering":
        """`deadline_s`: what a read of so many bytes may take. Raises FailedPreconditionError or
        UnavailableError where UCX or GPUDirect was asked for and cannot be had,
        InvalidArgumentError (files)."""
        tls = options.tls
        channels = PeerChannels(
            channel_credentials(tls) if tls else None,
            client_context(tls) if tls else None,
            bearer_metadata(options.key),
        )
        sidecar = None
        if options.transfer != OFF:
            try:
                sidecar = await TransferSidecar.start(pool.arena.fd, pool.arena.capacity_bytes)
            except (FailedPreconditionError, UnavailableError) as error:
                if options.transfer == UCX or options.gpudirect is not None:
                    raise
                # Without the wheels of UCX that is as expected; adapters are streamed.
                missing = isinstance(error, FailedPreconditionError)
                expected = missing and error.field != UCX_PREFIX
                level = logging.INFO if expected else logging.WARNING
                _log.log(level, "no one-sided reads: %s", error)
        reader = None
        if options.gpudirect is not None:
            try:
                reader = await proven_reader(options.gpudirect)
            except BaseException:
                if sidecar is not None:
                    await sidecar.close()
                raise
        return cls(node_id, pool, channels, sidecar, deadline_s, on_read, reader)

    def transports(self) -> str:
        """Those that bytes may come and go over, for people."""
        info = self.sidecar.info if self.sidecar else None
        if info is None or not info.transports:
            return "gRPC"
        return f"UCX {info.ucx_version} ({', '.join(info.transports)}), else gRPC"

    async def close(self) -> None:
        await self.source.close()
        if self.sidecar is not None:
            try:
                await self.sidecar.close()
            except LoraServeError as error:
                _log.error("ending the transfer sidecar: %s", error)
