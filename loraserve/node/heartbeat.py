"""The node's line to its controller: register, then heartbeats out and commands back.

Serving never waits for it: without a controller the node goes on with what it has.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from loraserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from loraserve.node.commands import Commands
from loraserve.node.convert import adapter_id_to_wire, load_from_wire, seconds
from loraserve.node.demand import Sample, sample_to_wire
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.node import Node
from loraserve.node.node_service import software_version
from loraserve.node.residency import ResidencyReport
from loraserve.placement.types import AdapterId
from loraserve.v1 import common_pb2, controller_pb2, controller_pb2_grpc
from loraserve.wire import STORE_MARK
from loraserve.wire_errors import from_rpc_error

_log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 5.0
# It is there, and will not have the node as it is.
_REFUSALS = (
    FailedPreconditionError,
    InvalidArgumentError,
    PermissionDeniedError,
    UnauthenticatedError,
)
_FIRST_BACKOFF_S = 0.2
# A controller that is back must hear of all its nodes within five seconds.
_LAST_BACKOFF_S = 1.0
# Changes are told at once, but several within this time together.
_MIN_PERIOD_S = 0.02


class StaleController(Exception):
    """An older leader than one that was heard: its word counts nothing."""


class ControllerClient:
    """The calls of a node to the controller that need no registration."""

    def __init__(
        self, channel: grpc.aio.Channel, base: str, metadata: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.stub = controller_pb2_grpc.ControllerServiceStub(channel)
        self.metadata = tuple(metadata)
        self._base = base

    async def resolve(self, adapter: AdapterId, revision: str | None) -> AdapterLoadInfo:
        """Raises NotFoundError, UnavailableError."""
        request = controller_pb2.ResolveAdapterRequest(adapter=adapter_id_to_wire(adapter))
        if revision is not None:
            request.revision = revision
        try:
            answer = await self.stub.ResolveAdapter(
                request, timeout=_CALL_TIMEOUT_S, metadata=self.metadata
            )
        except grpc.aio.AioRpcError as error:
            typed = from_rpc_error(error)
            if isinstance(typed, NotFoundError):
                raise NotFoundError("adapter", f"{adapter.name!r} does not exist") from None
            # The node's own trouble (a wrong key, a lost controller) is none of the caller's.
            _log.warning("asking the controller for %s: %s", adapter, typed)
            raise UnavailableError(
                "adapter", f"{adapter.name!r} is not here, and the controller does not answer"
            ) from None
        return load_from_wire(answer.load, self._base)


class ControllerLink:
    """Keeps one registration alive; `run` until cancelled."""

    def __init__(self, client: ControllerClient, node: Node, advertise: str) -> None:
        self._client = client
        self._node = node
        self._advertise = advertise
        self._changed = asyncio.Event()
        self._commands = Commands(node, self.wake)
        self._report = ResidencyReport(node.adapters)
        self._told: str | None = None
        # What was sent since the controller's last word: it may never have arrived.
        self._unanswered: list[Sample] = []
        self._flushes: list[asyncio.Future[None]] = []
        self.epoch = 0
        self.registered = asyncio.Event()
        self.store_mark = ""
        """Of the controller's store, where it told it with the registration."""

    def wake(self) -> None:
        """Something changed that the controller should hear of before the period is over."""
        self._changed.set()

    async def flush(self, timeout_s: float) -> None:
        """Returns when the controller has been sent what is true now, or the time is over."""
        flush: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flushes.append(flush)
        self.wake()
        await asyncio.wait({flush}, timeout=timeout_s)

    async def run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        try:
            while True:
                try:
                    period_s = await self._register()
                    backoff_s = _FIRST_BACKOFF_S
                    await self._beat(period_s)
                except grpc.aio.AioRpcError as error:
                    self._tell_trouble(from_rpc_error(error))
                except (StaleController, LoraServeError) as error:
                    self._tell_trouble(error)
                except Exception:
                    _log.exception("the line to the controller broke")
                self.registered.clear()
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
        finally:
            await self._commands.close()

    def _tell_trouble(self, error: Exception) -> None:
        """Once for the same trouble, however long it lasts."""
        why = str(error)
        if why != self._told:
            refused = isinstance(error, _REFUSALS)
            what = "the controller refuses this node" if refused else "no controller"
            _log.warning("%s, serving goes on: %s", what, why)
            self._told = why

    def _check_epoch(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise StaleController(f"epoch {epoch} is older than {self.epoch}, which was heard")
        self.epoch = epoch

    async def _register(self) -> float:
        """The heartbeat period in seconds."""
        node = self._node
        call = self._client.stub.RegisterNode(
            controller_pb2.RegisterNodeRequest(
                node_id=node.node_id,
                incarnation=node.incarnation,
                address=self._advertise,
                base=node.base,
                devices=node.devices,
                adapter_memory_bytes=node.adapters.memory_bytes,
                limits=node.wire_limits,
                software_version=software_version(),
                relative_speed=node.relative_speed,
                heard_epoch=self.epoch,
                shape=node.wire_shape,
            ),
            timeout=_CALL_TIMEOUT_S,
            metadata=self._client.metadata,
        )
        answer = await call
        self._check_epoch(answer.epoch)
        told = {key: value for key, value in await call.initial_metadata()}
        self.store_mark = str(told.get(STORE_MARK, ""))
        self._commands.restart()
        period_s = seconds(answer.heartbeat_period)
        if not 0 < period_s <= 3600:
            raise LoraServeError("heartbeat_period", f"{period_s} s from the controller")
        _log.info("registered as %s, epoch %d", node.node_id, answer.epoch)
        self._told = None
        self.registered.set()
        return period_s

    async def _beat(self, period_s: float) -> None:
        """Until the stream ends, which it does by raising unless the node must register again."""
        call = self._client.stub.Heartbeat(metadata=self._client.metadata)
        listening = asyncio.create_task(self._listen(call))
        self._report.restart()
        try:
            while not listening.done():
                self._changed.clear()
                sample = self._node.demand.take()
                self._unanswered.append(sample)
                flushes, self._flushes = self._flushes, []
                try:
                    for heartbeat in self._heartbeats(sample_to_wire(sample)):
                        await call.write(heartbeat)
                except BaseException:
                    self._flushes += flushes
                    raise
                for flush in flushes:
                    flush.cancel()
                await asyncio.sleep(min(_MIN_PERIOD_S, period_s / 2))
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait(
                    {listening, changed}, timeout=period_s, return_when=asyncio.FIRST_COMPLETED
                )
                changed.cancel()
            await listening
        except asyncio.InvalidStateError:  # the call ended; its status says why
            await listening
            raise UnavailableError("controller", "ended the heartbeat stream") from None
        finally:
            listening.cancel()
            call.cancel()
            await asyncio.wait({listening})
            if not listening.cancelled():
                listening.exception()  # raised above, where it mattered
            for sample in self._unanswered:
                self._node.demand.give_back(sample)
            self._unanswered = []

    async def _listen(self, call: Any) -> None:
        """Returns where the node must register again."""
        while True:
            response = await call.read()
            if response is grpc.aio.EOF:
                raise UnavailableError("controller", "ended the heartbeat stream")
            self._check_epoch(response.epoch)
            if response.must_register:
                _log.info("the controller does not know this node: registering again")
                return
            self._unanswered = []
            if response.send_full_residency:
                self._report.restart()
                self.wake()
            for command in response.commands:
                self._commands.apply(command)
            if response.commands:
                self.wake()

    def _heartbeats(
        self, demand: Sequence[common_pb2.AdapterDemand]
    ) -> list[controller_pb2.HeartbeatRequest]:
        """One, or several where the residency is too long for it; the last has all else."""
        node = self._node
        parts = self._report.parts()
        for part in parts:
            part.node_id, part.incarnation, part.epoch = node.node_id, node.incarnation, self.epoch
        parts[-1].MergeFrom(
            controller_pb2.HeartbeatRequest(
                load=node.load(),
                demand=demand,
                results=self._commands.take_results(),
                draining=node.draining,
                applied_command_id=self._commands.applied_id,
            )
        )
        return parts
