"""A plan that can be changed copy by copy, with every node's predicted utilisation kept current."""

import math
from collections.abc import Iterable

import numpy as np

from loraserve.placement.columns import (
    Bools,
    Columns,
    Entries,
    node_features,
    node_ranks,
)
from loraserve.placement.load import Floats, Ints
from loraserve.placement.operating_point import MAX_RANK

GONE = -1.0  # the share of an entry that was dropped


class Ledger:
    """Entries by number; those of the plan come first, new ones are appended."""

    def __init__(self, p: Columns, entries: Entries) -> None:
        self.p = p
        self._start = entries
        count = len(entries)
        self.share: list[float] | Floats = entries.share.copy()
        self._new_adapter: list[int] = []
        self._new_node: list[int] = []
        self._new_share: list[float] = []
        ends = np.cumsum(entries.counts(p.adapters))
        self._ends = ends
        small = np.uint16 if p.nodes < 2**16 else np.int64
        self._by_node = np.argsort(entries.node.astype(small), kind="stable")
        self._node_ends = np.cumsum(np.bincount(entries.node, minlength=p.nodes))
        self._extra_of_adapter: dict[int, list[int]] = {}
        self._extra_of_node: dict[int, list[int]] = {}
        self.features = node_features(p, entries)
        self.ranks = node_ranks(p, entries)
        used = np.bincount(entries.node, p.size_bytes[entries.adapter], minlength=p.nodes)
        self.free = p.memory - used.astype(np.int64)
        self.weights = p.charges.weights
        self.load = np.empty(p.nodes)
        self._refresh_all()
        self._count = count
        self._forbidden: dict[int, list[int]] = {}
        for key in p.forbidden.tolist():
            self._forbidden.setdefault(key // p.nodes, []).append(key % p.nodes)

    def _refresh_all(self) -> None:
        weights = self.weights[np.minimum(self.ranks, MAX_RANK)]
        self.load = (self.features * weights).sum(axis=1) / self.p.capacity

    # Reading

    def adapter_of(self, e: int) -> int:
        if e < self._count:
            return int(self._start.adapter[e])
        return self._new_adapter[e - self._count]

    def node_of(self, e: int) -> int:
        if e < self._count:
            return int(self._start.node[e])
        return self._new_node[e - self._count]

    def share_of(self, e: int) -> float:
        if e < self._count:
            return float(self.share[e])
        return self._new_share[e - self._count]

    def copies(self, adapter: int) -> list[int]:
        """Entries of the adapter that are not dropped."""
        end = int(self._ends[adapter])
        begin = int(self._ends[adapter - 1]) if adapter else 0
        found = [*range(begin, end), *self._extra_of_adapter.get(adapter, ())]
        return [e for e in found if self.share_of(e) != GONE]

    def serving(self, node: int) -> tuple[Ints, Ints, Floats, Floats]:
        """Entries of the node that carry demand: numbers, adapters, shares, and features
        [entries, features]."""
        e, adapter, share = self.held(node)
        busy = (share > 0) & self.p.active[adapter]
        e, adapter, share = e[busy], adapter[busy], share[busy]
        return e, adapter, share, self.p.charges.features(adapter, share)

    def held(self, node: int) -> tuple[Ints, Ints, Floats]:
        """All entries of the node that are not dropped: numbers, adapters, shares."""
        begin = int(self._node_ends[node - 1]) if node else 0
        e = self._by_node[begin : int(self._node_ends[node])]
        extra = self._extra_of_node.get(node, [])
        adapter, share = self._start.adapter[e], np.asarray(self.share)[e]
        if extra:
            e = np.r_[e, extra]
            adapter = np.r_[adapter, [self.adapter_of(x) for x in extra]]
            share = np.r_[share, [self.share_of(x) for x in extra]]
        there = share != GONE
        return e[there], adapter[there], share[there]

    def added_load(self, adapter: int, share: float, features: Floats) -> Floats:
        """[nodes]: their utilisation if each got `features` of the adapter."""
        if not self.p.load.padded:
            return np.asarray(self.load + features[0] / self.p.capacity)
        ranks = np.minimum(np.maximum(self.ranks, self.p.rank[adapter]), MAX_RANK)
        work = ((self.features + features) * self.weights[ranks]).sum(axis=1)
        return np.asarray(work / self.p.capacity)

    def may_take(self, adapter: int, besides: Iterable[int], free: Ints | None = None) -> Bools:
        """[nodes]: whether a new copy is allowed and fits. `besides`: the nodes whose copies stay;
        a new one must be in another failure domain while those are in too few. `free` stands in for
        the free memory."""
        p = self.p
        room = self.free if free is None else free
        good = (room >= p.size_bytes[adapter]) & (p.rank_limit >= p.rank[adapter])
        for n in self._forbidden.get(adapter, ()):
            good[n] = False
        besides = list(besides)
        good[besides] = False
        if p.replicas > 1 and len(besides) < 2 * p.replicas:
            domains = {int(p.domain[n]) for n in besides}
            if len(domains) < p.replicas:
                good &= ~np.isin(p.domain, list(domains))
        return good

    # Changing

    def set_share(self, e: int, share: float) -> None:
        """`GONE` drops the copy."""
        adapter, node, old = self.adapter_of(e), self.node_of(e), self.share_of(e)
        self._account(adapter, node, max(old, 0.0), max(share, 0.0))
        if e < self._count:
            self.share[e] = share
        else:
            self._new_share[e - self._count] = share
        if share == GONE:
            self.free[node] += self.p.size_bytes[adapter]
        if share <= 0 and old > 0 and self.ranks[node] == self.p.rank[adapter]:
            _, left, _, _ = self.serving(node)
            self.ranks[node] = self.p.rank[left].max(initial=0)
        self._refresh(node)

    def add(self, adapter: int, node: int, share: float) -> int:
        e = self._count + len(self._new_adapter)
        self._new_adapter.append(adapter)
        self._new_node.append(node)
        self._new_share.append(share)
        self._extra_of_adapter.setdefault(adapter, []).append(e)
        self._extra_of_node.setdefault(node, []).append(e)
        self.free[node] -= self.p.size_bytes[adapter]
        self._account(adapter, node, 0.0, share)
        self._refresh(node)
        return e

    def _account(self, adapter: int, node: int, old: float, new: float) -> None:
        c = self.p.charges
        self.features[node] += c.linear[adapter] * (new - old)
        seen = float(c.seen[adapter])
        reads = math.exp(-seen * old) - math.exp(-seen * new)
        self.features[node, -1] += float(c.read[adapter]) * reads
        if new > 0 and self.p.active[adapter]:
            self.ranks[node] = max(self.ranks[node], self.p.rank[adapter])

    def _refresh(self, node: int) -> None:
        rank = min(int(self.ranks[node]), MAX_RANK)
        if not self.p.load.padded:
            self.load[node] = self.features[node, 0] / self.p.capacity[node]
        else:
            work = float(self.features[node] @ self.weights[rank])
            self.load[node] = work / self.p.capacity[node]

    def entries(self) -> Entries:
        """The plan as it is now."""
        adapter = np.r_[self._start.adapter, np.array(self._new_adapter, np.int64)]
        node = np.r_[self._start.node, np.array(self._new_node, np.int64)]
        share = np.r_[np.asarray(self.share), np.array(self._new_share)]
        keep = share != GONE
        if not len(self._new_adapter):
            return Entries(adapter[keep], node[keep], np.maximum(share[keep], 0.0))
        return Entries.of(adapter[keep], node[keep], np.maximum(share[keep], 0.0))
