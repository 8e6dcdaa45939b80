"""The route table as a value, and the difference between two tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraserve.controller.events import Residency
from loraserve.placement.types import AdapterId

WHOLE_WEIGHT = 100


@dataclass(frozen=True)
class RouteHolder:
    node_id: str
    weight: int
    state: Residency


@dataclass(frozen=True)
class RevisionRoute:
    """`holders` is never empty."""

    revision: str
    holders: tuple[RouteHolder, ...]
    max_rank: int
    size_bytes: int


@dataclass(frozen=True)
class AdapterRoute:
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
    """Immutable once made: watchers keep the one they sent last."""

    epoch: int
    version: int
    adapters: Mapping[AdapterId, AdapterRoute] = field(default_factory=dict)
    nodes: Mapping[str, NodeRoute] = field(default_factory=dict)


@dataclass(frozen=True)
class RouteDelta:
    """Changed entries whole, and the keys of those that are gone."""

    adapters: tuple[AdapterRoute, ...] = ()
    nodes: tuple[NodeRoute, ...] = ()
    removed_adapters: tuple[AdapterId, ...] = ()
    removed_nodes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.adapters or self.nodes or self.removed_adapters or self.removed_nodes)


def difference(old: RouteTable, new: RouteTable) -> RouteDelta:
    """What turns `old` into `new`, in the order of the keys."""
    return RouteDelta(
        tuple(r for k, r in sorted(new.adapters.items()) if old.adapters.get(k) != r),
        tuple(r for k, r in sorted(new.nodes.items()) if old.nodes.get(k) != r),
        tuple(k for k in sorted(old.adapters) if k not in new.adapters),
        tuple(k for k in sorted(old.nodes) if k not in new.nodes),
    )
