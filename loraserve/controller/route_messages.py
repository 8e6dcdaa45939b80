"""Route tables and their changes as messages of a watch, filtered for the caller."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from loraserve.controller.convert import in_parts
from loraserve.controller.route_log import RouteChanges
from loraserve.placement.types import AdapterId, in_order
from loraserve.security import Identity
from loraserve.v1 import controller_pb2

Sees = Callable[[AdapterId], bool]


def sees(identity: Identity, base: str) -> Sees:
    """Which adapters the caller may see and asked for; an empty base is all of them."""
    everything, tenant = identity.sees_all_tenants, identity.tenant
    return lambda a: (everything or a.tenant == tenant) and (not base or a.base == base)


def messages(
    changes: RouteChanges,
    visible: Sees,
    base: str,
    first: bool,
    rank_costs: controller_pb2.RankCosts | None = None,
) -> Iterator[controller_pb2.WatchRoutesResponse]:
    """None where the caller sees nothing of the change, unless it is its `first` answer."""
    table, changed = changes.table, changes.changed
    whole = changed is None
    adapters = table.adapters if changed is None else changed.adapters
    touched = sorted(table.nodes if changed is None else changed.nodes)
    nodes = [table.nodes[i] for i in touched if i in table.nodes]
    nodes = [node for node in nodes if not base or node.base == base]
    head = controller_pb2.WatchRoutesResponse(epoch=table.epoch, version=table.version, full=whole)
    if rank_costs is not None:
        head.rank_costs.CopyFrom(rank_costs)
    head.removed_node_ids.extend(i for i in touched if i not in table.nodes)
    mine: Iterable[AdapterId] = filter(visible, adapters)
    gone: list[AdapterId] = []
    if not whole:
        mine = in_order(mine)
        gone = [a for a in mine if a not in table.adapters]
    routes = (table.adapters[a] for a in mine if a in table.adapters)
    start = list(islice(routes, 1))
    if first or whole or start or nodes or head.removed_node_ids or gone:
        yield from in_parts(head, nodes, gone, chain(start, routes))
