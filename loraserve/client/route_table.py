"""The route table that a client keeps: values, and how updates change them. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loraserve.client.packed_routes import PackedRoutes
from loraserve.client.routes import AdapterRoute as AdapterRoute
from loraserve.client.routes import Holder as Holder
from loraserve.client.routes import NodeRoute as NodeRoute
from loraserve.client.routes import RankCosts as RankCosts
from loraserve.client.routes import RevisionRoute as RevisionRoute
from loraserve.errors import InvalidArgumentError
from loraserve.placement.types import AdapterId
from loraserve.security.identity import DEFAULT_TENANT


@dataclass(frozen=True)
class RouteTable:
    """Immutable. `every_node`: no placement is known, any node may hold any adapter. `rank_costs`:
    placement leaves it to routing which ranks meet on a node (the policy `request_level`)."""

    epoch: int = 0
    version: int = 0
    adapters: Mapping[AdapterId, AdapterRoute] = field(default_factory=PackedRoutes)
    nodes: Mapping[str, NodeRoute] = field(default_factory=dict)
    every_node: bool = False
    rank_costs: RankCosts | None = None

    @cached_property
    def packed(self) -> PackedRoutes:
        """`adapters`, as they came or packed now."""
        routes = self.adapters
        return routes if isinstance(routes, PackedRoutes) else PackedRoutes(routes.values())

    def find(self, base: str, name: str) -> AdapterRoute | None:
        """The route of an adapter; an empty base where the name alone is clear.

        A table shows the adapters of the caller's tenant. Only callers of servers without keys see
        those of others too, and are the default tenant. Raises InvalidArgumentError.
        """
        found = [r for r in self.packed.named(name) if base in ("", r.adapter.base)]
        if len({r.adapter.tenant for r in found}) > 1:
            found = [r for r in found if r.adapter.tenant == DEFAULT_TENANT]
        if len(found) > 1:
            bases = ", ".join(sorted(r.adapter.base for r in found))
            raise InvalidArgumentError("base", f"must be named, {name!r} exists for: {bases}")
        return found[0] if found else None

    def bases(self) -> set[str]:
        """The names of the base models that nodes serve."""
        return {node.base for node in self.nodes.values()}


def static_table(addresses: tuple[str, ...]) -> RouteTable:
    """The table of a client that has a list of nodes and no controller."""
    return RouteTable(nodes={a: NodeRoute(a, a) for a in addresses}, every_node=True)


@dataclass(frozen=True)
class RouteUpdate:
    """One message of a route watch. `full`: the whole table; else entries that changed, whole, and
    the keys of those that are gone. `more`: the next update belongs to this one."""

    epoch: int
    version: int
    full: bool = False
    adapters: tuple[AdapterRoute, ...] = ()
    nodes: tuple[NodeRoute, ...] = ()
    removed_adapters: tuple[AdapterId, ...] = ()
    removed_nodes: tuple[str, ...] = ()
    more: bool = False
    rank_costs: RankCosts | None = None


def updated(table: RouteTable, update: RouteUpdate) -> RouteTable:
    """`table` with the update applied, whatever its version."""
    adapters = PackedRoutes() if update.full else table.packed
    nodes = {} if update.full else dict(table.nodes)
    for node_id in update.removed_nodes:
        nodes.pop(node_id, None)
    nodes.update((node.node_id, node) for node in update.nodes)
    adapters = adapters.changed(update.adapters, update.removed_adapters)
    costs = update.rank_costs or (None if update.full else table.rank_costs)
    return RouteTable(update.epoch, update.version, adapters, nodes, rank_costs=costs)


class RouteBook:
    """The newest whole table of one or several watches in a row.

    Invariants: (epoch, version) of `table` never falls; a table in parts is seen when its last part
    is there, or never.
    """

    def __init__(self) -> None:
        self.table = RouteTable()
        self._begun: RouteTable | None = None

    def begin(self) -> None:
        """A new watch starts; parts of the one before are forgotten."""
        self._begun = None

    def take(self, update: RouteUpdate) -> bool:
        """Applies an update. False where it is older than the table, or not the next part of one
        that has begun: then every delta that follows it on this watch is for a table that we do
        not have, and the watch must be given up."""
        at = (update.epoch, update.version)
        if at < (self.table.epoch, self.table.version):
            return False
        begun = self._begun
        if begun is not None and not update.full and at != (begun.epoch, begun.version):
            return False
        table = updated(begun or self.table, update)
        self._begun = table if update.more else None
        if not update.more:
            self.table = table
        return True
