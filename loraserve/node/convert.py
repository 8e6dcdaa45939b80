"""Wire messages to the node's values. What comes from the wire is checked here."""

from google.protobuf.duration_pb2 import Duration

from loraserve.errors import FailedPreconditionError
from loraserve.node.load_info import AdapterLoadInfo, Peer
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.security.identity import check_name, check_revision
from loraserve.v1 import common_pb2, node_pb2


def check_base_of_node(base: str, served: str) -> str:
    """The base that a message means; empty is the node's only one. Raises
    FailedPreconditionError."""
    if base and base != served:
        raise FailedPreconditionError("base", f"{base[:80]!r}, this node serves {served!r}")
    return served


def adapter_id_from_wire(message: common_pb2.AdapterId, base: str) -> AdapterId:
    """Raises InvalidArgumentError, FailedPreconditionError."""
    return AdapterId(
        check_name("adapter.tenant", message.tenant),
        check_base_of_node(message.base, base),
        check_name("adapter.name", message.name),
    )


def adapter_id_to_wire(adapter: AdapterId) -> common_pb2.AdapterId:
    return common_pb2.AdapterId(tenant=adapter.tenant, base=adapter.base, name=adapter.name)


def load_from_wire(message: node_pb2.AdapterLoad, base: str) -> AdapterLoadInfo:
    """Raises InvalidArgumentError, FailedPreconditionError. Size and rank are 0 where unknown."""
    spec = AdapterSpec(
        adapter_id_from_wire(message.adapter, base),
        check_revision("revision", message.revision),
        message.size_bytes,
        message.max_rank,
    )
    return AdapterLoadInfo(spec, tuple(Peer(p.node_id, p.address) for p in message.peers))


def seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
