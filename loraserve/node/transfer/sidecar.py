"""The node's side of loraserve-transfer: one-sided reads from peers' host pools into this one's."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraserve.errors import FailedPreconditionError, LoraServeError, UnavailableError
from loraserve.node.transfer import messages
from loraserve.node.transfer.process import SidecarProcess
from loraserve.node.transfer.program import PROGRAM, find_program, program_environment
from loraserve.v1 import node_pb2

_log = logging.getLogger(__name__)

_RDMA = ("rc_", "dc_", "srd")
_SAME_HOST = "cma"
# Reads in whose time the sidecar died, from one address, before nothing is read there any more.
_MAX_DEATHS = 2
_MAX_SUSPECTS = 256


@dataclass(frozen=True)
class Timing:
    """Seconds. The program itself ends a read at its deadline, by closing the endpoint, and ends
    itself where that does not help within 5 s; `grace_s` comes after both."""

    start_s: float = 60.0
    grace_s: float = 10.0
    ping_interval_s: float = 5.0
    ping_timeout_s: float = 10.0
    first_backoff_s: float = 0.1
    max_backoff_s: float = 10.0
    """Doubled from life to life; a life of longer than this begins again with the first."""
    suspicion_s: float = 600.0
    """How long nothing is read from where reads have killed the program."""


@dataclass(frozen=True)
class TransferInfo:
    """What peers and people may know of a sidecar. Another life has another `worker_address`."""

    ucx_version: str
    """major.minor.patch"""
    host: str
    """Equal for two processes that may read each other's memory on one host."""
    transports: tuple[str, ...]
    """One-sided ones, as UCX names them; none: this sidecar reads from nobody."""
    worker_address: bytes


class TransferSidecar:
    """Restarts the program when it dies; what was exported before is forgotten then. Lives on the
    event loop."""

    def __init__(
        self,
        program: Path,
        arena_fd: int,
        capacity_bytes: int,
        timing: Timing,
        life: SidecarProcess,
    ) -> None:
        """Use `start`."""
        self._program = program
        self._arena_fd = arena_fd
        self._capacity_bytes = capacity_bytes
        self._timing = timing
        self._closing = False
        self._suspects: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # deaths, the last
        self._life: SidecarProcess | None = None
        self._exports: dict[int, tuple[int, messages.Exported]] = {}
        # By offset, the last request about it: an older one's answer is of no account.
        self._asked: dict[int, int] = {}
        self._numbers = itertools.count()
        self._begin(life)
        self._supervision = asyncio.create_task(self._supervise(life))
        self.restarts = 0
        self.last_transports: tuple[str, ...] = ()
        """Of the endpoint of the last read that succeeded."""

    @classmethod
    async def start(
        cls,
        arena_fd: int,
        capacity_bytes: int,
        *,
        program: Path | None = None,
        timing: Timing | None = None,
    ) -> "TransferSidecar":
        """`arena_fd`: a memory file of at least `capacity_bytes`, sealed against shrinking. It is
        the caller's and stays open. Raises FailedPreconditionError where this machine has no such
        transport, UnavailableError where the program does not start."""
        timing = timing or Timing()
        program = program or find_program()
        if program is None:
            raise FailedPreconditionError("transfer", f"{PROGRAM} is not installed")
        life = await SidecarProcess.start(
            program, program_environment(), arena_fd, capacity_bytes, timing.start_s
        )
        return cls(program, arena_fd, capacity_bytes, timing, life)

    @property
    def info(self) -> TransferInfo | None:
        """None while the program is not there; another object for every life of it."""
        return None if self._life is None else self._info

    @property
    def pid(self) -> int | None:
        return None if self._life is None else self._life.pid

    async def export(self, offset: int, length: int) -> tuple[bytes, int]:
        """(rkey, address): with `info.worker_address`, what a peer needs to read these bytes of the
        arena, until `withdraw`. Exporting the same again gives the same, at no cost. Raises
        UnavailableError while the program is not there, InvalidArgumentError,
        ResourceExhaustedError."""
        life = self._alive()
        known = self._exports.get(offset)
        if known is not None and known[0] == length:
            return known[1].rkey, known[1].address
        number = self._asked[offset] = next(self._numbers)
        try:
            answer = await life.call(
                messages.EXPORT, messages.export(offset, length), self._timing.grace_s
            )
            assert isinstance(answer, messages.Exported)
            if life is self._life and self._asked.get(offset) == number:
                self._exports[offset] = (length, answer)
        finally:
            self._answered(offset, number)
        return answer.rkey, answer.address

    async def withdraw(self, offset: int) -> None:
        """Nothing happens where nothing is exported. Not a revocation: over some transports whoever
        has the key can read on; the generation in the slot header tells them."""
        life = self._life
        if life is None:
            return
        self._exports.pop(offset, None)
        # Also where none is known: one that was cancelled may have been made all the same.
        number = self._asked[offset] = next(self._numbers)
        try:
            with contextlib.suppress(UnavailableError):
                await life.call(messages.WITHDRAW, messages.withdraw(offset), self._timing.grace_s)
        finally:
            self._answered(offset, number)

    def _answered(self, offset: int, number: int) -> None:
        if self._asked.get(offset) == number:
            del self._asked[offset]

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
        """Reads the packed bytes [skip_bytes, size_bytes) of the slot into the arena, the first of
        them to `local_offset`. `arrived(n)`: the next n bytes are there, in order, not yet known to
        be of the right generation; what it raises ends the read and is raised here.

        When this returns or raises, also when it was cancelled, nothing is written to the arena
        any more. Raises UnavailableError (the peer is gone or its time over: another may do),
        FailedPreconditionError (no one-sided transport between the two, or another UCX),
        NotFoundError (the slot is another one by now), InvalidArgumentError (a lie or a mistake in
        `remote`), ResourceExhaustedError."""
        life = self._alive()
        self.check_reachable(remote)
        body = messages.read(
            address=remote.address,
            generation=remote.generation,
            size_bytes=size_bytes,
            skip_bytes=skip_bytes,
            local_offset=local_offset,
            timeout_s=timeout_s,
            header_bytes=remote.header_bytes,
            worker_address=remote.worker_address,
            rkey=remote.rkey,
        )
        told = 0

        def on_progress(bytes_arrived: int) -> None:
            nonlocal told
            if not told <= bytes_arrived <= size_bytes - skip_bytes:
                raise UnavailableError("transfer", f"{bytes_arrived} bytes after {told}")
            step, told = bytes_arrived - told, bytes_arrived
            if arrived is not None and step:
                arrived(step)

        address = remote.worker_address
        try:
            answer = await life.call(
                messages.READ, body, timeout_s + self._timing.grace_s, on_progress
            )
        except (UnavailableError, asyncio.CancelledError):
            if life.ended.is_set() and not self._closing:
                self._suspect(address)
            raise
        self._suspects.pop(address, None)
        assert isinstance(answer, messages.Ended)
        on_progress(size_bytes - skip_bytes)
        self.last_transports = answer.transports

    def check_reachable(self, remote: node_pb2.RemoteSlot) -> None:
        """Raises FailedPreconditionError where a read is not worth trying, UnavailableError."""
        mine = self._alive().ready
        if _release(remote.ucx_version) != _release(mine.ucx_version):
            # Their wire formats differ, and not always with an error.
            raise FailedPreconditionError(
                "ucx_version",
                f"the peer has {remote.ucx_version!r:.40}, this node has {mine.ucx_version}",
            )
        same_host = remote.host == mine.host and _SAME_HOST in mine.transports
        if not same_host and not any(name.startswith(_RDMA) for name in mine.transports):
            raise FailedPreconditionError(
                "transports",
                "the peer is on another host, container or user, and there is no RDMA here",
            )
        deaths, last_s = self._suspects.get(remote.worker_address, (0, 0.0))
        if deaths >= _MAX_DEATHS and time.monotonic() - last_s < self._timing.suspicion_s:
            raise FailedPreconditionError(
                "worker_address", f"the sidecar died {_MAX_DEATHS} times while it read from there"
            )

    async def close(self) -> None:
        """Ends the program; running reads end with UnavailableError."""
        self._closing = True
        life, self._life = self._life, None
        if life is not None:
            await life.close()
        self._supervision.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervision

    def _alive(self) -> SidecarProcess:
        if self._life is None:
            raise UnavailableError("transfer", "the sidecar is not there")
        return self._life

    def _begin(self, life: SidecarProcess) -> None:
        self._exports = {}
        self._life = life
        ready = life.ready
        self._info = TransferInfo(
            ready.ucx_version, ready.host, ready.transports, ready.worker_address
        )
        _log.info(
            "transfer sidecar %d: UCX %s, %s",
            *(life.pid, life.ready.ucx_version),
            ", ".join(life.ready.transports) or "no one-sided transport",
        )

    async def _supervise(self, life: SidecarProcess) -> None:
        backoff_s = self._timing.first_backoff_s
        while True:
            began_s = time.monotonic()
            await self._watch(life)
            self._life = None
            if self._closing:
                return
            await life.close()
            if time.monotonic() - began_s > self._timing.max_backoff_s:
                backoff_s = self._timing.first_backoff_s
            while True:
                _log.warning("the transfer sidecar is gone; another starts in %.1f s", backoff_s)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, self._timing.max_backoff_s)
                try:
                    life = await SidecarProcess.start(
                        *(self._program, program_environment(), self._arena_fd),
                        *(self._capacity_bytes, self._timing.start_s),
                    )
                except (LoraServeError, OSError) as error:
                    _log.error("the transfer sidecar does not start: %s", error)
                else:
                    break
            self.restarts += 1
            self._begin(life)

    async def _watch(self, life: SidecarProcess) -> None:
        """Until it has ended. One that does not answer is killed."""
        while True:
            try:
                await asyncio.wait_for(life.ended.wait(), self._timing.ping_interval_s)
                return
            except asyncio.TimeoutError:
                with contextlib.suppress(LoraServeError):
                    await life.call(messages.PING, b"", self._timing.ping_timeout_s)

    def _suspect(self, address: bytes) -> None:
        """One more read in whose time the program died. A success clears the address; and so does
        time, but for one death more."""
        deaths, _ = self._suspects.pop(address, (0, 0.0))
        self._suspects[address] = (deaths + 1, time.monotonic())
        while len(self._suspects) > _MAX_SUSPECTS:
            self._suspects.popitem(last=False)


def _release(version: str) -> list[str]:
    return version.split(".")[:2]
