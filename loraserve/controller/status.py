"""The cluster at one moment, as a message: for operators, and for what scales the cluster."""

from collections import Counter

from loraserve.controller.membership import Node
from loraserve.controller.state import ControllerState
from loraserve.v1 import controller_pb2


def status_of(state: ControllerState) -> controller_pb2.GetClusterStatusResponse:
    counts = Counter(node.record.base for node in state.nodes.values())
    return controller_pb2.GetClusterStatusResponse(
        epoch=state.epoch,
        route_version=state.routes.version,
        adapters=len(state.routes.adapters),
        unrouted_adapters=state.unrouted,
        nodes=[_node(state, node) for _, node in sorted(state.nodes.items())],
        wanted_nodes=[
            controller_pb2.WantedNodes(
                base=base,
                nodes=wanted.nodes,
                current_nodes=counts[base],
                reason=wanted.reason,
            )
            for base, wanted in sorted(state.wanted.items())
        ],
        moved_bytes=state.moved_bytes,
        ignored_reports=dict(state.ignored),
    )


def _node(state: ControllerState, node: Node) -> controller_pb2.NodeStatus:
    r = node.record
    return controller_pb2.NodeStatus(
        node_id=r.node_id,
        address=r.address,
        base=r.base,
        draining=node.draining,
        disconnected=not node.heard,
        failure_domain=r.domain,
        relative_speed=r.speed,
        adapter_memory_bytes=r.adapter_memory_bytes,
        used_bytes=node.used_bytes,
        copies=len(node.copies),
        wanted_adapters=state.wanted_on(r.node_id),
        predicted_utilisation=state.utilisation.get(r.node_id, 0.0),
    )
