"""Route tables and their changes as messages of a watch, filtered for the caller."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from loraserve.controller.convert import (
    adapter_id_to_wire,
    node_route_to_wire,
    route_to_wire,
)
from loraserve.controller.route_log import RouteChanges
from loraserve.controller.routes import AdapterRoute
from loraserve.placement.types import AdapterId, in_order
from loraserve.security import Identity
from loraserve.v1 import controller_pb2

# Keeps a message of a large table well below the limit of 4 MiB, and the loop free for others
# while one is made.
ROUTES_PER_MESSAGE = 1000

Sees = Callable[[AdapterId], bool]


def sees(identity: Identity, base: str) -> Sees:
    """Which adapters the caller may see and asked for; an empty base is all of them."""
    everything, tenant = identity.sees_all_tenants, identity.tenant
    return lambda a: (everything or a.tenant == tenant) and (not base or a.base == base)


def messages(
    changes: RouteChanges, visible: Sees, base: str, first: bool
) -> Iterator[controller_pb2.WatchRoutesResponse]:
    """None where the caller sees nothing of the change, unless it is its `first` answer."""
    table, changed = changes.table, changes.changed
    whole = changed is None
    adapters = table.adapters if changed is None else changed.adapters
    nodes = table.nodes if changed is None else changed.nodes
    head = controller_pb2.WatchRoutesResponse(epoch=table.epoch, version=table.version, full=whole)
    for node_id in sorted(nodes):
        node = table.nodes.get(node_id)
        if node is None:
            head.removed_node_ids.append(node_id)
        elif not base or node.base == base:
            head.nodes.append(node_route_to_wire(node))
    mine: Iterable[AdapterId] = filter(visible, adapters)
    if not whole:
        mine = in_order(mine)
        gone = [a for a in mine if a not in table.adapters]
        head.removed_adapters.extend(map(adapter_id_to_wire, gone))
    routes = (table.adapters[a] for a in mine if a in table.adapters)
    part = list(islice(routes, ROUTES_PER_MESSAGE))
    if not (first or whole or part or head.nodes or head.removed_node_ids or head.removed_adapters):
        return
    yield from _parts(head, part, routes)


def _parts(
    message: controller_pb2.WatchRoutesResponse,
    part: list[AdapterRoute],
    routes: Iterator[AdapterRoute],
) -> Iterator[controller_pb2.WatchRoutesResponse]:
    while True:
        message.adapters.extend(map(route_to_wire, part))
        part = list(islice(routes, ROUTES_PER_MESSAGE))
        message.more = bool(part)
        yield message
        if not part:
            return
        message = controller_pb2.WatchRoutesResponse(epoch=message.epoch, version=message.version)
