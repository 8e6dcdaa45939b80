"""A problem and a plan as columns: what the policies work on, at 100,000 adapters and more.

Adapters and nodes are indexes into the columns. Entries (adapter, node, share) are sorted by
adapter, then node.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from loraserve.placement.arrays import Bools, Floats, Ints
from loraserve.placement.load import Charges, LoadModel, default_load_model
from loraserve.placement.operating_point import MAX_RANK

MANY = np.iinfo(np.int64).max
MOST_LISTED = 4096  # ranks up to this are found by a table, others by sorting


@dataclass(frozen=True, eq=False)
class Entries:
    """Copies of adapters on nodes, each with its share of the adapter's requests."""

    adapter: Ints
    node: Ints
    share: Floats

    @staticmethod
    def of(adapter: npt.ArrayLike, node: npt.ArrayLike, share: npt.ArrayLike) -> "Entries":
        """Sorted by adapter, then node."""
        a, n = np.asarray(adapter, np.int64), np.asarray(node, np.int64)
        s = np.asarray(share, np.float64)
        if len(a) and not np.all((a[1:] > a[:-1]) | ((a[1:] == a[:-1]) & (n[1:] > n[:-1]))):
            # A merge of sorted runs is what callers have: the stable sort does that in one pass.
            order = np.argsort(a * (int(n.max()) + 1) + n, kind="stable")
            a, n, s = a[order], n[order], s[order]
        return Entries(a, n, s)

    @staticmethod
    def none() -> "Entries":
        return Entries.of([], [], [])

    def __len__(self) -> int:
        return len(self.adapter)

    def where(self, keep: Bools) -> "Entries":
        return Entries(self.adapter[keep], self.node[keep], self.share[keep])

    def counts(self, adapters: int) -> Ints:
        """[adapters]: copies of each."""
        return np.bincount(self.adapter, minlength=adapters)


@dataclass(frozen=True, eq=False)
class Columns:
    """The problem. `adapter_ids` and `node_ids` name the rows, for hashes and messages only.

    `domain` holds small integers, equal for nodes that fail together. `forbidden` holds sorted
    keys adapter x nodes + node. `current` names only nodes that are here."""

    size_bytes: Ints
    rank: Ints
    prefill: Floats
    decode: Floats
    memory: Ints
    max_rank: Ints
    domain: Ints
    speed: Floats
    adapter_ids: Sequence[object]
    node_ids: Sequence[str]
    adapter_base: Ints
    node_base: Ints
    bases: Sequence[str] = ("",)
    current: Entries = field(default_factory=Entries.none)
    forbidden: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    replicas: int = 1
    byte_budget: int | None = None
    load: LoadModel = field(default_factory=default_load_model)

    @property
    def adapters(self) -> int:
        return len(self.size_bytes)

    @property
    def nodes(self) -> int:
        return len(self.memory)

    @cached_property
    def charges(self) -> Charges:
        return self.load.charges(self.size_bytes, self.rank, self.prefill, self.decode)

    @cached_property
    def alone(self) -> Floats:
        """[adapters]: utilisation of a node of speed 1 that serves nothing else."""
        return self.charges.alone(self.rank)

    @cached_property
    def active(self) -> Bools:
        return (self.prefill + self.decode) > 0

    @cached_property
    def capacity(self) -> Floats:
        return self.load.capacity(self.speed)

    @cached_property
    def rank_classes(self) -> tuple[Ints, Ints]:
        """The distinct ranks, highest first, and which of them each adapter has."""
        if self.rank.max(initial=0) > MOST_LISTED:
            ranks, of = np.unique(-self.rank, return_inverse=True)
            return -ranks, of.astype(np.int64)
        ranks = np.flatnonzero(np.bincount(self.rank))[::-1]
        table = np.zeros(MOST_LISTED + 1, np.int64)
        table[ranks] = np.arange(len(ranks))
        return ranks, table[self.rank]

    @cached_property
    def rank_limit(self) -> Ints:
        """[nodes]: `max_rank` with no limit as one above every rank."""
        return np.where(self.max_rank > 0, self.max_rank, np.iinfo(np.int32).max).astype(np.int64)

    @cached_property
    def adapter_keys(self) -> npt.NDArray[np.uint64]:
        return hashed(self.adapter_ids)

    @cached_property
    def node_keys(self) -> npt.NDArray[np.uint64]:
        return hashed(self.node_ids)

    def able(self, adapter: Ints, node: Ints) -> Bools:
        """Elementwise: whether the node may hold the adapter if it held nothing else."""
        good = np.ones(len(adapter), np.bool_)
        if self.rank_limit.min(initial=MANY) < self.rank.max(initial=0):
            good &= self.rank[adapter] <= self.rank_limit[node]
        if self.memory.min(initial=MANY) < self.size_bytes.max(initial=0):
            good &= self.size_bytes[adapter] <= self.memory[node]
        if len(self.forbidden):
            some = np.flatnonzero(self._has_forbidden[adapter])
            key = adapter[some] * self.nodes + node[some]
            at = np.minimum(np.searchsorted(self.forbidden, key), len(self.forbidden) - 1)
            good[some] &= self.forbidden[at] != key
        return good

    @cached_property
    def _has_forbidden(self) -> Bools:
        """[adapters]: whether some node is forbidden for it."""
        has = np.zeros(self.adapters, np.bool_)
        has[self.forbidden // self.nodes] = True
        return has


def hashed(names: Sequence[object]) -> npt.NDArray[np.uint64]:
    """64 bits of each name, the same everywhere and always; integers hash as their digits."""
    digests = (hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


@dataclass(frozen=True, eq=False)
class Plan:
    """Every adapter is in `entries`, its shares summing to 1, or in `reasons`."""

    entries: Entries
    reasons: Mapping[int, str] = field(default_factory=dict)


ColumnPolicy = Callable[[Columns], Plan]


def node_ranks(p: Columns, entries: Entries) -> Ints:
    """[nodes]: the largest rank with demand there, 0 where nothing is."""
    ranks = np.zeros(p.nodes, np.int64)
    busy = (entries.share > 0) & p.active[entries.adapter]
    np.maximum.at(ranks, entries.node[busy], p.rank[entries.adapter[busy]])
    return ranks


def node_features(p: Columns, entries: Entries) -> Floats:
    """[nodes, features]."""
    features = p.charges.features(entries.adapter, entries.share)
    return np.stack(
        [np.bincount(entries.node, column, minlength=p.nodes) for column in features.T], axis=1
    )


def utilisation(p: Columns, entries: Entries) -> Floats:
    """[nodes]: predicted, 1 at the SLO. The entries may be in any order."""
    if not p.load.padded:
        return np.asarray(node_features(p, entries)[:, 0] / p.capacity)
    ranks = np.minimum(node_ranks(p, entries), MAX_RANK)
    work = (node_features(p, entries) * p.charges.weights[ranks]).sum(axis=1)
    return np.asarray(work / p.capacity)


def peak(p: Columns, entries: Entries) -> float:
    """The highest predicted utilisation of a node."""
    return float(utilisation(p, entries).max(initial=0.0))


def interference(p: Columns, entries: Entries) -> float:
    """Mean over tokens of how far the largest rank on their node is over their own."""
    tokens = (p.prefill + p.decode)[entries.adapter] * entries.share
    over = node_ranks(p, entries)[entries.node] - p.rank[entries.adapter]
    return float((tokens * np.maximum(over, 0)).sum() / max(tokens.sum(), 1e-300))


def bytes_moved(p: Columns, entries: Entries) -> int:
    """Of copies that are not in `p.current`."""
    new = ~np.isin(entry_keys(p, entries), entry_keys(p, p.current), assume_unique=True)
    return int(p.size_bytes[entries.adapter[new]].sum())


def entry_keys(p: Columns, entries: Entries) -> Ints:
    return entries.adapter * p.nodes + entries.node
