"""The route table as a value, and the difference between two tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from loraserve.controller.adapter_map import AdapterMap
from loraserve.controller.residency import Residency
from loraserve.placement.types import AdapterId, in_order

WHOLE_WEIGHT = 100


# Tuples, as 200,000 of them are made and compared when a controller starts.


class RouteHolder(NamedTuple):
    node_id: str
    weight: int
    state: Residency


class RevisionRoute(NamedTuple):
    """`holders` is never empty."""

    revision: str
    holders: tuple[RouteHolder, ...]
    max_rank: int
    size_bytes: int


class AdapterRoute(NamedTuple):
    """`revision` is what requests by name get; `unrouted_reason` is set where no node serves it."""

    adapter: AdapterId
    revision: str
    revisions: tuple[RevisionRoute, ...]
    unrouted_reason: str = ""


@dataclass(frozen=True)
class NodeRoute:
    node_id: str
    address: str
    draining: bool
    incarnation: int
    base: str
    base_digest: str


@dataclass(frozen=True)
class RouteTable:
    """Immutable: whoever holds one still reads that one."""

    epoch: int
    version: int
    adapters: Mapping[AdapterId, AdapterRoute] = field(default_factory=AdapterMap)
    nodes: Mapping[str, NodeRoute] = field(default_factory=dict)


@dataclass(frozen=True)
class RouteDelta:
    """Changed entries whole, and the keys of those that are gone; all in the order of the keys."""

    adapters: tuple[AdapterRoute, ...] = ()
    nodes: tuple[NodeRoute, ...] = ()
    removed_adapters: tuple[AdapterId, ...] = ()
    removed_nodes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.adapters or self.nodes or self.removed_adapters or self.removed_nodes)

    def __len__(self) -> int:
        return sum(map(len, (self.adapters, self.nodes, self.removed_adapters, self.removed_nodes)))


def difference(old: RouteTable, new: RouteTable) -> RouteDelta:
    """What turns `old` into `new`."""
    return RouteDelta(
        tuple(
            new.adapters[k]
            for k in in_order(new.adapters)
            if old.adapters.get(k) != new.adapters[k]
        ),
        tuple(r for k, r in sorted(new.nodes.items()) if old.nodes.get(k) != r),
        tuple(k for k in in_order(old.adapters) if k not in new.adapters),
        tuple(k for k in sorted(old.nodes) if k not in new.nodes),
    )


class RouteWriter:
    """Makes one table after the other; versions rise by one."""

    def __init__(self, epoch: int) -> None:
        self.table = RouteTable(epoch, 0)
        self._adapters: AdapterMap[AdapterRoute] = AdapterMap()
        # Adapters of the table that no node serves.
        self.unrouted = 0

    def write(
        self,
        adapters: Mapping[AdapterId, AdapterRoute | None],
        nodes: Mapping[str, NodeRoute | None],
    ) -> RouteDelta:
        """`adapters` and `nodes`: entries that may have changed, None for those that are gone;
        adapters in their order. Where something did change, `table` is a new one."""
        known = self._adapters
        changed: dict[AdapterId, AdapterRoute] = {}
        gone: list[AdapterId] = []
        unrouted = self.unrouted
        for adapter, route in adapters.items():
            old = known.find(adapter)
            if route == old:
                continue
            unrouted -= old is not None and not old.revisions
            if route is None:
                gone.append(adapter)
            else:
                changed[adapter] = route
                unrouted += not route.revisions
        new_nodes = {
            n: r for n, r in nodes.items() if r is not None and self.table.nodes.get(n) != r
        }
        gone_nodes = sorted(n for n, r in nodes.items() if r is None and n in self.table.nodes)
        delta = RouteDelta(
            tuple(changed.values()),
            tuple(r for _, r in sorted(new_nodes.items())),
            tuple(gone),
            tuple(gone_nodes),
        )
        if not delta:
            return delta
        self.unrouted = unrouted
        if changed or gone:
            self._adapters = known.changed(changed, gone)
        node_table = self.table.nodes
        if new_nodes or gone_nodes:
            node_table = {**node_table, **new_nodes}
            for n in gone_nodes:
                del node_table[n]
        self.table = RouteTable(
            self.table.epoch, self.table.version + 1, self._adapters, node_table
        )
        return delta
