"""The values that placement works on. No gRPC, no clock, no randomness."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class AdapterId:
    """Unique in the cluster; `name` is unique within (tenant, base)."""

    tenant: str
    base: str
    name: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True)
class AdapterSpec:
    """One revision of an adapter. `size_bytes` is that of the packed adapter, `max_rank` the
    largest rank of its modules."""

    adapter: AdapterId
    revision: str
    size_bytes: int
    max_rank: int


@dataclass(frozen=True)
class NodeCapacity:
    """What a node can hold: packed bytes in all, and the largest rank (0: no limit)."""

    node_id: str
    base: str
    adapter_memory_bytes: int
    max_rank: int = 0


@dataclass(frozen=True)
class Demand:
    """Tokens per second of one adapter."""

    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class PlacementProblem:
    """`current` is the placement so far; a policy keeps what it can of it. `forbidden` holds
    (adapter, node) pairs that failed lately. `replicas` copies are wanted of every adapter, as far
    as nodes and memory allow."""

    adapters: tuple[AdapterSpec, ...]
    nodes: tuple[NodeCapacity, ...]
    demand: Mapping[AdapterId, Demand] = field(default_factory=dict)
    current: Mapping[AdapterId, tuple[str, ...]] = field(default_factory=dict)
    forbidden: frozenset[tuple[AdapterId, str]] = frozenset()
    replicas: int = 1


@dataclass(frozen=True)
class Placement:
    """Every adapter of the problem is in `holders` (node ids, never empty) or in `unplaced`
    (why)."""

    holders: Mapping[AdapterId, tuple[str, ...]]
    unplaced: Mapping[AdapterId, str]


PlacementPolicy = Callable[[PlacementProblem], Placement]
