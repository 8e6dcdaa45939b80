"""NodeService: what operators ask of one node."""

import asyncio
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from loraserve.errors import NotFoundError, UnavailableError
from loraserve.node.convert import adapter_id_from_wire, load_from_wire, seconds
from loraserve.node.node import Node
from loraserve.security import Role, current_identity
from loraserve.security.identity import check_revision
from loraserve.v1 import node_pb2, node_pb2_grpc
from loraserve.wire_errors import typed_errors


def software_version() -> str:
    try:
        return version("loraserve")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


class NodeServicer(node_pb2_grpc.NodeServiceServicer):
    def __init__(self, node: Callable[[], Node]) -> None:
        """`node` raises UnavailableError until there is one."""
        self._node = node

    @typed_errors
    async def LoadAdapter(
        self, request: node_pb2.LoadAdapterRequest, context: Any
    ) -> node_pb2.LoadAdapterResponse:
        node = self._node()
        held = node.adapters.begin_load(load_from_wire(request.load, node.facts.base), placed=True)
        await held.settled.wait()
        if held.error is not None:
            raise held.error
        return node_pb2.LoadAdapterResponse(residency=node.adapters.residency())

    @typed_errors
    async def UnloadAdapter(
        self, request: node_pb2.UnloadAdapterRequest, context: Any
    ) -> node_pb2.UnloadAdapterResponse:
        node = self._node()
        adapter = adapter_id_from_wire(request.adapter, node.facts.base)
        copies = node.adapters.copies(adapter)
        if request.HasField("revision"):
            revision = check_revision("revision", request.revision)
            copies = [held for held in copies if held.spec.revision == revision]
        if not copies:
            raise NotFoundError("adapter", f"{adapter} is not on this node")
        timeout_s = seconds(request.drain_timeout) if request.HasField("drain_timeout") else None
        for held in copies:
            node.adapters.begin_drop(held, timeout_s)
        dropping = {held.dropping for held in copies if held.dropping is not None}
        if dropping:
            await asyncio.wait(dropping)
        if any(held.dropping is None for held in copies):
            raise UnavailableError("adapter", f"{adapter} was asked for again meanwhile")
        return node_pb2.UnloadAdapterResponse(residency=node.adapters.residency())

    @typed_errors
    async def ListResidency(
        self, request: node_pb2.ListResidencyRequest, context: Any
    ) -> node_pb2.ListResidencyResponse:
        adapters = self._node().adapters
        return node_pb2.ListResidencyResponse(
            residency=adapters.residency(), generation=adapters.generation
        )

    @typed_errors
    async def GetNodeInfo(
        self, request: node_pb2.GetNodeInfoRequest, context: Any
    ) -> node_pb2.GetNodeInfoResponse:
        node = self._node()
        return node_pb2.GetNodeInfoResponse(
            node_id=node.node_id,
            incarnation=node.incarnation,
            base=node.base,
            devices=node.devices,
            limits=node.wire_limits,
            load=node.load(),
            draining=node.draining,
            software_version=software_version(),
            adapter_memory_bytes=node.adapters.memory_bytes,
        )

    @typed_errors
    async def Drain(self, request: node_pb2.DrainRequest, context: Any) -> node_pb2.DrainResponse:
        timeout_s = seconds(request.timeout) if request.HasField("timeout") else None
        return node_pb2.DrainResponse(ended_requests=await self._node().drain(timeout_s))

    @typed_errors
    async def Abort(self, request: node_pb2.AbortRequest, context: Any) -> node_pb2.AbortResponse:
        identity = current_identity()
        tenant = None if Role.ADMIN in identity.roles else identity.tenant
        return node_pb2.AbortResponse(found=self._node().requests.abort(tenant, request.request_id))
