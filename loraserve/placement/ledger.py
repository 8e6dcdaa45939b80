"""A plan that can be changed copy by copy, with every node's predicted utilisation kept current."""

import math
from collections.abc import Iterable

import numpy as np

from loraserve.placement.arrays import Bools, Floats, Ints
from loraserve.placement.columns import Columns, Entries, node_features, node_ranks
from loraserve.placement.operating_point import MAX_RANK

GONE = -1.0  # the share of an entry that was dropped


class Ledger:
    """Entries by number; those of the plan come first, new ones are appended."""

    def __init__(self, p: Columns, entries: Entries) -> None:
        self.p = p
        self._start = entries
        self._count = len(entries)
        self._share = entries.share.copy()
        self._new_adapter: list[int] = []
        self._new_node: list[int] = []
        self._new_share: list[float] = []
        self.copy_count = entries.counts(p.adapters)
        self._ends = np.cumsum(self.copy_count)
        self._pair = self.copy_count == 2
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
        weights = self.weights[np.minimum(self.ranks, MAX_RANK)]
        self.load: Floats = (self.features * weights).sum(axis=1) / p.capacity
        self._forbidden: dict[int, list[int]] = {}
        for key in p.forbidden.tolist():
            self._forbidden.setdefault(key // p.nodes, []).append(key % p.nodes)
        # Single numbers are read ten times faster through these than from the arrays.
        self._adapters, self._nodes = entries.adapter.data, entries.node.data
        self._shares, self._loads = self._share.data, self.load.data
        c = p.charges
        self._linear = [np.ascontiguousarray(f).data for f in c.linear.T]
        self._read, self._seen = c.read.data, c.seen.data
        self._capacity = p.capacity.data

    # Reading

    def adapter_of(self, e: int) -> int:
        return self._adapters[e] if e < self._count else self._new_adapter[e - self._count]

    def node_of(self, e: int) -> int:
        return self._nodes[e] if e < self._count else self._new_node[e - self._count]

    def share_of(self, e: int) -> float:
        return self._shares[e] if e < self._count else self._new_share[e - self._count]

    def load_of(self, node: int) -> float:
        return float(self._loads[node])

    def piece(self, adapter: int, share: float, node: int) -> float:
        """Utilisation that a share of the adapter makes on the node, at the node's rank."""
        seen = 1 - math.exp(-self._seen[adapter] * share)
        last = self._linear[-1][adapter] * share + self._read[adapter] * seen
        if len(self._linear) == 1:
            return last / self._capacity[node]
        weights = self.weights[min(max(self.ranks[node], self.p.rank[adapter]), MAX_RANK)]
        work = weights[-1] * last
        for k in range(len(self._linear) - 1):
            work += weights[k] * self._linear[k][adapter] * share
        return float(work) / self._capacity[node]

    def copies(self, adapter: int) -> list[int]:
        """Entries of the adapter that are not dropped."""
        end = int(self._ends[adapter])
        begin = int(self._ends[adapter - 1]) if adapter else 0
        shares = self._shares
        found = [e for e in range(begin, end) if shares[e] != GONE]
        extra = self._extra_of_adapter.get(adapter)
        if extra:
            found += [e for e in extra if self.share_of(e) != GONE]
        return found

    def may_shift(self, e: Ints, adapter: Ints, limit: float) -> Bools:
        """False where the adapter surely has no other copy on a node less busy than `limit`."""
        count = self.copy_count[adapter]
        paired = self._pair[adapter] & (count == 2) & (e < self._count)
        # The copies of a pair are neighbours, and `_ends` is behind the second.
        other = np.where(paired, 2 * self._ends[adapter] - 3 - e, 0)
        same = self._start.adapter[other] == adapter if self._count else paired
        busy = self.load[self._start.node[other]] >= limit if self._count else paired
        return np.asarray((count > 1) & ~(paired & same & busy))

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
        adapter, share = self._start.adapter[e], self._share[e]
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
                for d in domains:
                    good &= p.domain != d
        return np.asarray(good)

    # Changing

    def set_share(self, e: int, share: float) -> None:
        """`GONE` drops the copy."""
        adapter, node, old = self.adapter_of(e), self.node_of(e), self.share_of(e)
        self._account(adapter, node, max(old, 0.0), max(share, 0.0))
        if e < self._count:
            self._share[e] = share
        else:
            self._new_share[e - self._count] = share
        if share == GONE:
            self.free[node] += self.p.size_bytes[adapter]
            self.copy_count[adapter] -= 1
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
        self.copy_count[adapter] += 1
        self._account(adapter, node, 0.0, share)
        self._refresh(node)
        return e

    def _account(self, adapter: int, node: int, old: float, new: float) -> None:
        seen = self._seen[adapter]
        for k, column in enumerate(self._linear):
            self.features[node, k] += column[adapter] * (new - old)
        reads = math.exp(-seen * old) - math.exp(-seen * new)
        self.features[node, -1] += self._read[adapter] * reads
        if new > 0 and self.p.active[adapter]:
            self.ranks[node] = max(self.ranks[node], self.p.rank[adapter])

    def _refresh(self, node: int) -> None:
        if len(self._linear) == 1:
            self.load[node] = self.features[node, 0] / self._capacity[node]
        else:
            rank = min(int(self.ranks[node]), MAX_RANK)
            work = float(self.features[node] @ self.weights[rank])
            self.load[node] = work / self._capacity[node]

    def entries(self) -> Entries:
        """The plan as it is now."""
        adapter = np.r_[self._start.adapter, np.array(self._new_adapter, np.int64)]
        node = np.r_[self._start.node, np.array(self._new_node, np.int64)]
        share = np.r_[self._share, np.array(self._new_share)]
        keep = share != GONE
        if not len(self._new_adapter):
            return Entries(adapter[keep], node[keep], np.maximum(share[keep], 0.0))
        return Entries.of(adapter[keep], node[keep], np.maximum(share[keep], 0.0))
