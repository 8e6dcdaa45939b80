"""The sidecar's reader inside this process, for reads into a GPU's memory (GPUDirect).

The network card writes to device memory under the context that registered it, so a sidecar cannot
do it. Nothing here runs unless GPUDirect is switched on or the doctor is asked to prove it: opening
a reader loads UCX into the process.
"""

import asyncio
import ctypes
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraserve.errors import FailedPreconditionError, LoraServeError, UnavailableError
from loraserve.node.transfer.program import UCX_PREFIX, library_folder, set_for_this_process
from loraserve.v1 import node_pb2

if TYPE_CHECKING:
    from loraserve.engine.device_staging import DeviceStaging

# UCX reads these as it is loaded. No handlers of signals; no hooks of mmap and munmap and no
# guesses at what kind of memory an address is: everything is registered by name.
_AT_LOAD = {
    "UCX_LOG_LEVEL": "error",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_HANDLE_ERRORS": "none",
    "UCX_MEM_MMAP_HOOK_MODE": "none",
    "UCX_MEMTYPE_CACHE": "n",
}
_LIBRARIES = ("libucm.so.0", "libucs.so.0", "libuct.so.0", "libucp.so.0")
_loading = threading.Lock()
# Readers that could not end a read, and the memory that it may still write to.
_never_freed: list[tuple[Any, Any]] = []


def _extension() -> Any:
    """Raises FailedPreconditionError."""
    with _loading:
        set_for_this_process(_AT_LOAD)
        try:
            if prefix := os.environ.get(UCX_PREFIX):
                # By their names; the extension then takes these and not the wheel's.
                folder = library_folder(Path(prefix))
                for name in _LIBRARIES:
                    if (folder / name).exists():
                        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            from loraserve import _transfer_reader
        except (ImportError, OSError) as error:
            raise FailedPreconditionError(
                "gpudirect", f"this build has no reader for the node's process: {error}"
            ) from None
        return _transfer_reader


def _typed(code: str, message: str) -> LoraServeError:
    """As the sidecar's node side has it: where the time is over, another holder may do."""
    from loraserve.engine.assembly import typed_error

    if code in ("DEADLINE_EXCEEDED", "CANCELLED"):
        return UnavailableError("transfer", message)
    return typed_error(code, message)


class InNodeReader:
    """Reads peers' slots into `staging`, one at a time. Any thread.

    `host_memory`: the staging is host memory standing in for a device's, for tests; the transports
    are the sidecar's then.
    """

    def __init__(self, staging: "DeviceStaging", *, host_memory: bool = False) -> None:
        """Raises FailedPreconditionError, saying what UCX or the hardware lacks."""
        self.staging = staging
        extension = _extension()
        self._status_error = extension.StatusError
        try:
            self._native = extension.SlotReader(device=not host_memory)
            self._native.register(staging.address, staging.size_bytes, device=not host_memory)
        except self._status_error as error:
            raise _typed(*error.args) from None

    def __del__(self) -> None:
        # UCX lets the memory go before it is freed.
        native = self.__dict__.pop("_native", None)
        if native is not None and native.stuck:
            _never_freed.append((native, self.staging))

    @property
    def ucx_version(self) -> str:
        return str(self._native.ucx_version)

    @property
    def transports(self) -> tuple[str, ...]:
        """One-sided ones that are there; what works, a read tells."""
        return tuple(filter(None, self._native.transports.split(",")))

    def read_blocking(
        self,
        remote: node_pb2.RemoteSlot,
        size_bytes: int,
        timeout_s: float,
        *,
        skip_bytes: int = 0,
    ) -> tuple[str, ...]:
        """The packed bytes [skip_bytes, size_bytes) to the start of the staging: not yet checked.
        The transports it went over. Raises as TransferSidecar.read does; then nothing writes to the
        staging any more, unless `stuck`."""
        try:
            over = self._native.read(
                address=remote.address,
                generation=remote.generation,
                size_bytes=size_bytes,
                skip_bytes=skip_bytes,
                local_offset=0,
                timeout_us=max(1, int(timeout_s * 1e6)),
                header_bytes=remote.header_bytes,
                worker_address=remote.worker_address,
                rkey=remote.rkey,
            )
        except self._status_error as error:
            raise _typed(*error.args) from None
        return tuple(filter(None, over.split(",")))

    async def read(
        self,
        remote: node_pb2.RemoteSlot,
        size_bytes: int,
        timeout_s: float,
        *,
        skip_bytes: int = 0,
    ) -> tuple[str, ...]:
        """As `read_blocking`, in a thread. A cancelled read is waited for, to its deadline."""
        reading = asyncio.ensure_future(
            asyncio.to_thread(
                self.read_blocking, remote, size_bytes, timeout_s, skip_bytes=skip_bytes
            )
        )
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.wait([reading])
            raise

    @property
    def stuck(self) -> bool:
        """A read could not be ended: the staging may be written for as long as the process lives,
        and nothing is read any more."""
        return bool(self._native.stuck)
