"""The values that placement works on. No gRPC, no clock, no randomness.

These are for callers with thousands of adapters at most; policies work on arrays (`columns.py`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from loraserve.placement.load import LoadModel, default_load_model


class AdapterId(NamedTuple):
    """Unique in the cluster; `name` is unique within (tenant, base). A key of nearly everything, so
    a tuple, which is hashed and compared several times as fast as a dataclass."""

    tenant: str
    base: str
    name: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"


def in_order(adapters: Iterable[AdapterId]) -> list[AdapterId]:
    """Sorted."""
    return sorted(adapters)


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
    """What a node can hold: packed bytes in all, and the largest rank (0: no limit).

    `domain`: nodes that fail together carry the same word; "" is a domain of the node's own.
    `speed`: steps per second relative to the profile of the load model."""

    node_id: str
    base: str
    adapter_memory_bytes: int
    max_rank: int = 0
    domain: str = ""
    speed: float = 1.0


class Demand(NamedTuple):
    """Tokens per second of one adapter."""

    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class PlacementProblem:
    """`current` is the placement so far; a policy keeps what it can of it. `forbidden` holds
    (adapter, node) pairs that failed lately. `replicas` copies are wanted of every adapter, in
    different failure domains, as far as nodes and memory allow. `current_shares` goes with
    `current`; equal shares where it says nothing. `byte_budget`: bytes that a policy may move for
    balance alone; None is no limit."""

    adapters: tuple[AdapterSpec, ...]
    nodes: tuple[NodeCapacity, ...]
    demand: Mapping[AdapterId, Demand] = field(default_factory=dict)
    current: Mapping[AdapterId, tuple[str, ...]] = field(default_factory=dict)
    forbidden: frozenset[tuple[AdapterId, str]] = frozenset()
    replicas: int = 1
    current_shares: Mapping[AdapterId, tuple[float, ...]] = field(default_factory=dict)
    byte_budget: int | None = None
    load: LoadModel = field(default_factory=default_load_model)


@dataclass(frozen=True)
class Placement:
    """Every adapter of the problem is in `holders` (node ids, never empty) or in `unplaced`
    (why). `shares` goes with `holders`: which part of the adapter's requests each should get;
    they sum to 1, and a copy kept only against failures has 0."""

    holders: Mapping[AdapterId, tuple[str, ...]]
    unplaced: Mapping[AdapterId, str]
    shares: Mapping[AdapterId, tuple[float, ...]] = field(default_factory=dict)

    def weights(self, adapter: AdapterId, whole: int = 100) -> dict[str, int]:
        """Of its holders, for a route: the shares as integers over 0, `whole` for all of it."""
        held = self.holders.get(adapter, ())
        shares = self.shares.get(adapter, (1 / max(1, len(held)),) * len(held))
        return {n: max(1, round(whole * s)) for n, s in zip(held, shares, strict=True)}


PlacementPolicy = Callable[[PlacementProblem], Placement]
