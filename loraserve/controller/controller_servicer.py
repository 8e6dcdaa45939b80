"""ControllerService: nodes report and are told; clients and nodes watch routes."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.duration_pb2 import Duration

from loraserve.controller.convert import (
    adapter_id_from_wire,
    command_to_wire,
    heartbeat_from_wire,
    in_parts,
    load_to_wire,
    node_from_wire,
)
from loraserve.controller.events import AskRegister, NodeRecord, NodeRegistered
from loraserve.controller.metrics import ControllerMetrics
from loraserve.controller.routes import RouteTable, difference
from loraserve.controller.runtime import NodeLink, Runtime
from loraserve.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from loraserve.security import Identity, current_identity
from loraserve.security.identity import check_revision
from loraserve.v1 import controller_pb2, controller_pb2_grpc
from loraserve.wire_errors import typed_errors

_log = logging.getLogger(__name__)


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    def __init__(self, runtime: Runtime, metrics: ControllerMetrics) -> None:
        self._runtime = runtime
        self._metrics = metrics

    @typed_errors
    async def RegisterNode(
        self, request: controller_pb2.RegisterNodeRequest, context: Any
    ) -> controller_pb2.RegisterNodeResponse:
        record = node_from_wire(request)
        self._check_same_weights(record)
        await self._runtime.apply(NodeRegistered(record))
        settings = self._runtime.settings
        period = Duration()
        period.FromMilliseconds(round(settings.tick_seconds * 1000))
        return controller_pb2.RegisterNodeResponse(
            epoch=self._runtime.state.epoch,
            heartbeat_period=period,
            missed_heartbeats_limit=settings.silent_ticks,
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
        beat = heartbeat_from_wire(first)
        node = self._runtime.state.nodes.get(beat.node_id)
        if node is None or node.record.incarnation != beat.incarnation:
            # Must not take the link from the node that is registered by this name.
            yield controller_pb2.HeartbeatResponse(
                epoch=self._runtime.state.epoch, must_register=True
            )
            return
        link = self._runtime.open_link(first.node_id)
        reading = asyncio.create_task(self._read(first, requests, link))
        try:
            async for commands in link.messages():
                yield controller_pb2.HeartbeatResponse(
                    epoch=self._runtime.state.epoch,
                    commands=[command_to_wire(c) for c in commands],
                    must_register=link.must_register,
                )
            if reading.done():
                reading.result()  # raises what was wrong with a heartbeat
        finally:
            reading.cancel()
            with contextlib.suppress(BaseException):
                await reading
            self._runtime.close_link(first.node_id, link)

    async def _read(
        self,
        first: controller_pb2.HeartbeatRequest,
        requests: AsyncIterator[controller_pb2.HeartbeatRequest],
        link: NodeLink,
    ) -> None:
        try:
            await self._take(first, link)
            async for request in requests:
                if request.node_id != link.node_id:
                    raise InvalidArgumentError("node_id", "changed within the stream")
                await self._take(request, link)
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
        effects = await self._runtime.apply(heartbeat_from_wire(request))
        known = not any(isinstance(effect, AskRegister) for effect in effects)
        if known:
            self._metrics.node_load(request.node_id, request.load)
        link.answer_beat(must_register=not known)

    @typed_errors
    async def WatchRoutes(
        self, request: controller_pb2.WatchRoutesRequest, context: Any
    ) -> AsyncIterator[controller_pb2.WatchRoutesResponse]:
        identity = current_identity()
        sent: RouteTable | None = None
        async for table in self._runtime.tables():
            seen = _visible(table, identity, request.base)
            known = (request.known_epoch, request.known_version) == (table.epoch, table.version)
            if sent is None and known:
                sent = seen
            for message in _messages(sent, seen):
                yield message
            sent = seen

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
        return controller_pb2.ResolveAdapterResponse(load=load_to_wire(spec))


def _visible(table: RouteTable, identity: Identity, base: str) -> RouteTable:
    """The part of the table that the caller may see and asked for."""
    if identity.sees_all_tenants and not base:
        return table
    return RouteTable(
        table.epoch,
        table.version,
        {
            a: r
            for a, r in table.adapters.items()
            if (identity.sees_all_tenants or a.tenant == identity.tenant)
            and (not base or a.base == base)
        },
        {i: n for i, n in table.nodes.items() if not base or n.base == base},
    )


def _messages(
    sent: RouteTable | None, table: RouteTable
) -> list[controller_pb2.WatchRoutesResponse]:
    """What brings a watcher from `sent` (None: from nothing) to `table`. A first answer and every
    change of what the watcher sees is told; other versions are not."""
    delta = difference(sent or RouteTable(table.epoch, 0), table)
    if sent is not None and not delta and sent.version != table.version:
        return []
    message = controller_pb2.WatchRoutesResponse(
        epoch=table.epoch,
        version=table.version,
        full=sent is None,
        removed_node_ids=delta.removed_nodes,
    )
    return list(in_parts(message, delta.nodes, delta.removed_adapters, delta.adapters))
