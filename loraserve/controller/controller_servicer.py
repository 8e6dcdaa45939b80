"""ControllerService: nodes report and are told; clients and nodes watch routes."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.duration_pb2 import Duration

from loraserve.controller.convert import (
    adapter_id_from_wire,
    command_to_wire,
    heartbeat_from_wire,
    load_to_wire,
    node_from_wire,
)
from loraserve.controller.events import (
    AskRegister,
    AskResidency,
    NodeRecord,
    NodeRegistered,
)
from loraserve.controller.metrics import ControllerMetrics
from loraserve.controller.route_messages import messages, sees
from loraserve.controller.runtime import NodeLink, Runtime
from loraserve.controller.status import status_of
from loraserve.controller.whole_heartbeat import WholeHeartbeat
from loraserve.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from loraserve.security import current_identity
from loraserve.security.identity import check_revision
from loraserve.v1 import controller_pb2, controller_pb2_grpc
from loraserve.wire import STORE_MARK
from loraserve.wire_errors import typed_errors

HEARTBEATS_PER_TICK = 2

_log = logging.getLogger(__name__)


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    def __init__(
        self,
        runtime: Runtime,
        metrics: ControllerMetrics,
        rank_costs: controller_pb2.RankCosts | None = None,
        store_mark: Callable[[], str] = str,
    ) -> None:
        """`rank_costs`: for clients that are to choose between nodes by ranks. `store_mark`: for
        nodes to see whether their store is the controller's."""
        self._runtime = runtime
        self._metrics = metrics
        self._rank_costs = rank_costs
        self._store_mark = store_mark

    @typed_errors
    async def RegisterNode(
        self, request: controller_pb2.RegisterNodeRequest, context: Any
    ) -> controller_pb2.RegisterNodeResponse:
        record = node_from_wire(request)
        self._check_same_weights(record)
        await self._runtime.apply(NodeRegistered(record, request.heard_epoch))
        if mark := self._store_mark():
            await context.send_initial_metadata(((STORE_MARK, mark),))
        settings = self._runtime.settings
        period = Duration()
        # Two in a tick: see Settings.quiet_ticks.
        period.FromMilliseconds(round(settings.tick_seconds * 1000 / HEARTBEATS_PER_TICK))
        return controller_pb2.RegisterNodeResponse(
            epoch=self._runtime.state.epoch,
            heartbeat_period=period,
            missed_heartbeats_limit=settings.silent_ticks * HEARTBEATS_PER_TICK,
        )

    def _check_same_weights(self, record: NodeRecord) -> None:
        """One base name is one set of weights, or answers would depend on the node."""
        for node_id, node in self._runtime.state.nodes.items():
            other = node.record
            if node_id == record.node_id or other.base != record.base:
                continue
            if other.base_digest and record.base_digest and other.base_digest != record.base_digest:
                raise FailedPreconditionError(
                    "base.digest",
                    f"{record.base!r} is {other.base_digest} on node {node_id!r}, not "
                    f"{record.base_digest}",
                )

    @typed_errors
    async def Heartbeat(
        self, requests: AsyncIterator[controller_pb2.HeartbeatRequest], context: Any
    ) -> AsyncIterator[controller_pb2.HeartbeatResponse]:
        first = await anext(aiter(requests), None)
        if first is None:
            return
        node = self._runtime.state.nodes.get(first.node_id)
        if node is None or node.record.incarnation != first.incarnation:
            # Must not take the link from the node that is registered by this name.
            yield controller_pb2.HeartbeatResponse(
                epoch=self._runtime.state.epoch, must_register=True
            )
            return
        link = self._runtime.open_link(first.node_id)
        reading = asyncio.create_task(self._read(first, requests, link))
        try:
            async for commands in link.messages():
                everything, link.send_everything = link.send_everything, False
                yield controller_pb2.HeartbeatResponse(
                    epoch=self._runtime.state.epoch,
                    commands=[command_to_wire(c, self._runtime.state.routes) for c in commands],
                    must_register=link.must_register,
                    send_full_residency=everything,
                )
            if reading.done():
                reading.result()  # raises what was wrong with a heartbeat
        finally:
            reading.cancel()
            with contextlib.suppress(BaseException):
                await reading
            await self._runtime.link_ended(link, first.incarnation)

    async def _read(
        self,
        first: controller_pb2.HeartbeatRequest,
        requests: AsyncIterator[controller_pb2.HeartbeatRequest],
        link: NodeLink,
    ) -> None:
        whole = WholeHeartbeat()
        try:
            if beat := whole.take(first):
                await self._take(beat, link)
            async for request in requests:
                if (request.node_id, request.incarnation) != (link.node_id, first.incarnation):
                    raise InvalidArgumentError("node_id", "changed within the stream")
                if beat := whole.take(request):
                    await self._take(beat, link)
        finally:
            link.close()

    async def _take(self, request: controller_pb2.HeartbeatRequest, link: NodeLink) -> None:
        for result in request.results:
            if result.HasField("error"):
                _log.warning(
                    "node %s: command %d failed: %s",
                    request.node_id,
                    result.command_id,
                    result.error.message,
                )
        beat = heartbeat_from_wire(request)
        effects = await self._runtime.apply(beat)
        known = not any(isinstance(effect, AskRegister) for effect in effects)
        if known:
            self._metrics.heard(request.node_id, request.load, beat.demand)
        gap = any(isinstance(effect, AskResidency) for effect in effects)
        link.answer_beat(must_register=not known, send_everything=gap)

    @typed_errors
    async def WatchRoutes(
        self, request: controller_pb2.WatchRoutesRequest, context: Any
    ) -> AsyncIterator[controller_pb2.WatchRoutesResponse]:
        visible = sees(current_identity(), request.base)
        known = (request.known_epoch, request.known_version)
        first = True
        async for changes in self._runtime.route_changes(known):
            for message in messages(changes, visible, request.base, first, self._rank_costs):
                yield message
            first = False

    @typed_errors
    async def ResolveAdapter(
        self, request: controller_pb2.ResolveAdapterRequest, context: Any
    ) -> controller_pb2.ResolveAdapterResponse:
        adapter = adapter_id_from_wire(request.adapter)
        state = self._runtime.state
        if request.HasField("revision"):
            spec = state.revision(adapter, check_revision("revision", request.revision))
        else:
            spec = state.current(adapter)
        if spec is None:
            raise NotFoundError("adapter", f"{adapter} does not exist")
        return controller_pb2.ResolveAdapterResponse(load=load_to_wire(spec, state.peers(spec)))

    @typed_errors
    async def GetClusterStatus(
        self, request: controller_pb2.GetClusterStatusRequest, context: Any
    ) -> controller_pb2.GetClusterStatusResponse:
        return status_of(self._runtime.state)
