"""Wire messages to the controller's values and back. What comes from the wire is checked here."""

from collections.abc import Iterable, Iterator
from itertools import chain

from google.protobuf.timestamp_pb2 import Timestamp

from loraserve.checkpoint.model_shape import ModelShape
from loraserve.controller.events import (
    Copy,
    CopyHolder,
    DemandSample,
    Heartbeat,
    NodeRecord,
    Residency,
    SendDrop,
    SendLoad,
)
from loraserve.controller.routes import AdapterRoute, NodeRoute, RouteTable
from loraserve.controller.store import AdapterRecord
from loraserve.errors import InvalidArgumentError, InvalidCheckpointError
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.security.identity import check_base, check_name, check_revision
from loraserve.v1 import adapter_pb2, common_pb2, controller_pb2, node_pb2
from loraserve.wire import split_address
from loraserve.wire_errors import OF_GRPC

# Of the routes in one message of a watch: well below the limit, whatever a route has in it.
ROUTES_BYTES = 1 << 20
# Codes (of google.rpc.Code) of errors that stay: INVALID_ARGUMENT and FAILED_PRECONDITION; and
# RESOURCE_EXHAUSTED where the node does not say when to come again.
_STAYS, _MAY_STAY = frozenset({3, 9}), 8
# A node's own words, as far as they are told in routes.
MAX_REASON_CHARACTERS = 300
# Told with a drop: enough for a request to find one that still holds the adapter.
MAX_TOLD_HOLDERS = 4
# Tag and length of an entry, at most.
_FIELD_BYTES = 6


def adapter_id_from_wire(message: common_pb2.AdapterId) -> AdapterId:
    """Raises InvalidArgumentError."""
    return AdapterId(
        check_name("adapter.tenant", message.tenant),
        check_base("adapter.base", message.base),
        check_name("adapter.name", message.name),
    )


def adapter_id_to_wire(adapter: AdapterId) -> common_pb2.AdapterId:
    return common_pb2.AdapterId(tenant=adapter.tenant, base=adapter.base, name=adapter.name)


def load_to_wire(spec: AdapterSpec, peers: Iterable[CopyHolder]) -> node_pb2.AdapterLoad:
    """`peers`: whom to read it from, best first."""
    return node_pb2.AdapterLoad(
        adapter=adapter_id_to_wire(spec.adapter),
        revision=spec.revision,
        size_bytes=spec.size_bytes,
        max_rank=spec.max_rank,
        peers=[node_pb2.AdapterPeer(node_id=p.node_id, address=p.address) for p in peers],
    )


def command_to_wire(command: SendLoad | SendDrop, routes: RouteTable) -> controller_pb2.Command:
    """`routes`: as published, for what a node tells those who come for what it has dropped."""
    message = controller_pb2.Command(command_id=command.command_id)
    if isinstance(command, SendLoad):
        message.load.CopyFrom(load_to_wire(command.spec, command.peers))
    else:
        message.drop.adapter.CopyFrom(adapter_id_to_wire(command.adapter))
        message.drop.revision = command.revision
        route = routes.adapters.get(command.adapter)
        for revision in route.revisions if route else ():
            if revision.revision == command.revision:
                holders = [h.node_id for h in revision.holders if h.node_id != command.node_id]
                message.drop.holder_node_ids.extend(holders[:MAX_TOLD_HOLDERS])
        message.drop.routes.epoch, message.drop.routes.version = routes.epoch, routes.version
    return message


def node_from_wire(message: controller_pb2.RegisterNodeRequest) -> NodeRecord:
    """Raises InvalidArgumentError."""
    host, port = split_address(message.address)
    if port == 0 or host in ("0.0.0.0", "::"):
        raise InvalidArgumentError("address", f"{message.address}: clients cannot connect to it")
    return NodeRecord(
        check_name("node_id", message.node_id),
        message.incarnation,
        message.address,
        check_base("base.name", message.base.name),
        message.base.digest,
        message.adapter_memory_bytes,
        message.limits.max_rank,
        next((d.failure_domain[:64] for d in message.devices if d.failure_domain), ""),
        message.relative_speed or 1.0,
        _shape_from_wire(message.shape) if message.HasField("shape") else None,
    )


def _shape_from_wire(message: common_pb2.ModelShape) -> ModelShape:
    """Raises InvalidArgumentError."""
    shape = ModelShape(
        message.num_layers,
        message.hidden_size,
        message.q_size,
        message.kv_size,
        message.intermediate_size,
    )
    if min(vars(shape).values()) < 1:
        raise InvalidArgumentError("shape", "has a size that is not over 0")
    return shape


def _stays(error: common_pb2.ErrorDetail) -> bool:
    """Whether the same load would end the same way again."""
    # What was admitted was whole: a source gave other bytes, or the way to it broke, and the next
    # load may do better.
    if error.reason == InvalidCheckpointError.reason or error.field == OF_GRPC:
        return False
    return error.code in _STAYS or (
        error.code == _MAY_STAY and not error.HasField("retry_after_ms")
    )


def heartbeat_from_wire(message: controller_pb2.HeartbeatRequest) -> Heartbeat:
    """Raises InvalidArgumentError."""
    copies = []
    for r in message.residency:
        try:
            state = Residency(r.state)
        except ValueError:
            raise InvalidArgumentError("residency.state", f"{r.state} is unknown") from None
        revision = check_revision("residency.revision", r.revision)
        adapter = adapter_id_from_wire(r.adapter)
        refused = state is Residency.FAILED and _stays(r.error)
        copies.append(Copy(adapter, revision, state, r.error.message, r.size_bytes, refused))
    removed = tuple(
        (adapter_id_from_wire(r.adapter), check_revision("removed.revision", r.revision))
        for r in message.removed
    )
    demand = tuple(
        DemandSample(adapter_id_from_wire(d.adapter), d.prefill_tokens, d.decode_tokens)
        for d in message.demand
    )
    failed = tuple(
        (r.command_id, r.error.message or r.error.reason or "failed")
        for r in message.results
        if r.HasField("error")
    )
    return Heartbeat(
        message.node_id,
        message.incarnation,
        message.generation,
        tuple(copies),
        demand,
        failed,
        message.draining,
        message.applied_command_id,
        message.since_generation,
        removed,
        message.epoch,
        message.load.queued_prefill_tokens,
    )


def route_to_wire(route: AdapterRoute) -> controller_pb2.AdapterRoute:
    message = controller_pb2.AdapterRoute(
        adapter=adapter_id_to_wire(route.adapter),
        revision=route.revision,
        unrouted_reason=route.unrouted_reason[:MAX_REASON_CHARACTERS],
    )
    for revision in route.revisions:
        made = message.revisions.add(
            revision=revision.revision,
            max_rank=revision.max_rank,
            size_bytes=revision.size_bytes,
        )
        for holder in revision.holders:
            made.holders.add(
                node_id=holder.node_id,
                weight=holder.weight,
                state=common_pb2.ResidencyState.ValueType(holder.state.value),
            )
    return message


def in_parts(
    head: controller_pb2.WatchRoutesResponse,
    nodes: Iterable[NodeRoute],
    removed: Iterable[AdapterId],
    routes: Iterable[AdapterRoute],
) -> Iterator[controller_pb2.WatchRoutesResponse]:
    """`head` with the entries, in as many messages as it takes to keep each of them short."""
    size = head.ByteSize()
    whole = chain(
        (("nodes", node_route_to_wire(n)) for n in nodes),
        (("removed_adapters", adapter_id_to_wire(a)) for a in removed),
        (("adapters", route_to_wire(r)) for r in routes),
    )
    for field, entry in whole:
        more = entry.ByteSize() + _FIELD_BYTES
        if size + more > ROUTES_BYTES:
            head.more = True
            yield head
            head = controller_pb2.WatchRoutesResponse(epoch=head.epoch, version=head.version)
            size = head.ByteSize()
        getattr(head, field).append(entry)
        size += more
    yield head


def node_route_to_wire(node: NodeRoute) -> controller_pb2.NodeRoute:
    return controller_pb2.NodeRoute(
        node_id=node.node_id,
        address=node.address,
        draining=node.draining,
        incarnation=node.incarnation,
        base=common_pb2.BaseModel(name=node.base, digest=node.base_digest),
    )


def _timestamp(microseconds: int) -> Timestamp:
    made = Timestamp()
    made.FromMicroseconds(microseconds)
    return made


def adapter_to_wire(
    record: AdapterRecord, copies: list[tuple[str, Copy]], unrouted_reason: str
) -> adapter_pb2.Adapter:
    """`copies`: (node id, copy) of the current revision."""
    spec = record.history[0]
    return adapter_pb2.Adapter(
        tenant=spec.adapter.tenant,
        base=spec.adapter.base,
        name=spec.adapter.name,
        revision=spec.revision,
        size_bytes=spec.size_bytes,
        max_rank=spec.max_rank,
        create_time=_timestamp(record.create_time_us),
        update_time=_timestamp(record.update_time_us),
        holders=[
            adapter_pb2.AdapterHolder(
                node_id=node_id, state=common_pb2.ResidencyState.ValueType(copy.state.value)
            )
            for node_id, copy in copies
        ],
        unrouted_reason=unrouted_reason[:MAX_REASON_CHARACTERS],
    )
