"""A plan that can be changed copy by copy, with every node's predicted utilisation kept current."""

import math
from collections.abc import Iterable

import numpy as np

from loraserve.placement.arrays import Bools, Floats, Ints
from loraserve.placement.columns import Columns, Entries, node_features
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
        self.ranks = self._count_ranks()
        used = np.bincount(entries.node, p.size_bytes[entries.adapter], minlength=p.nodes)
        self.free = p.memory - used.astype(np.int64)
        self.weights = p.charges.weights
        # By feature: one number is read and written at a time.
        self._features = np.ascontiguousarray(node_features(p, entries).T)
        weights = self.weights[np.minimum(self.ranks, MAX_RANK)]
        self.load: Floats = (self._features.T * weights).sum(axis=1) / p.capacity
        self._forbidden: dict[int, list[int]] = {}
        for key in p.forbidden.tolist():
            self._forbidden.setdefault(key // p.nodes, []).append(key % p.nodes)
        self._allowing: dict[int, Bools] = {}
        self._together: dict[int, Ints] = {}
        # Single numbers are read ten times faster through these than from the arrays.
        self._adapters, self._nodes = entries.adapter.data, entries.node.data
        self._shares: memoryview[float] = self._share.data  # type: ignore[assignment]
        self._loads: memoryview[float] = self.load.data
        c = p.charges
        self._linear = [np.ascontiguousarray(f).data for f in c.linear.T]
        self._sums = [f.data for f in self._features]
        self._read, self._seen = c.read.data, c.seen.data
        self._capacity: list[float] = p.capacity.tolist()

    def _count_ranks(self) -> Ints:
        """[nodes]: the largest rank with demand there. Keeps the number of such entries of every
        node and rank, so that a node's largest rank is known when one of them goes."""
        p, entries = self.p, self._start
        ranks, of = p.rank_classes
        self._class_of, self._class_ranks = of.data, ranks.tolist()
        self._active = p.active.data
        busy = (entries.share > 0) & p.active[entries.adapter]
        cells = entries.node[busy] * len(ranks) + of[entries.adapter[busy]]
        counts = np.bincount(cells, minlength=p.nodes * len(ranks))
        self._busy = counts.data
        there = counts.reshape(p.nodes, len(ranks)) > 0
        found = np.where(there.any(axis=1), ranks[there.argmax(axis=1)], 0)
        return np.asarray(found, np.int64)

    # Reading

    def adapter_of(self, e: int) -> int:
        return self._adapters[e] if e < self._count else self._new_adapter[e - self._count]

    def node_of(self, e: int) -> int:
        return self._nodes[e] if e < self._count else self._new_node[e - self._count]

    def share_of(self, e: int) -> float:
        return self._shares[e] if e < self._count else self._new_share[e - self._count]

    def load_of(self, node: int) -> float:
        return self._loads[node]

    def pieces(self, adapter: int, share: float, source: int, target: int) -> tuple[float, float]:
        """Utilisation that a share of the adapter makes on each of two nodes, at their ranks."""
        seen = 1 - math.exp(-self._seen[adapter] * share)
        last = self._linear[-1][adapter] * share + self._read[adapter] * seen
        if len(self._linear) == 1:
            return last / self._capacity[source], last / self._capacity[target]
        found = []
        for node in (source, target):
            weights = self.weights[min(max(self.ranks[node], self.p.rank[adapter]), MAX_RANK)]
            work = weights[-1] * last
            for k in range(len(self._linear) - 1):
                work += weights[k] * self._linear[k][adapter] * share
            found.append(float(work) / self._capacity[node])
        return found[0], found[1]

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

    def partners(self, e: Ints, adapter: Ints, limit: float) -> tuple[Bools, Ints]:
        """Of each entry: False where its adapter surely has no other copy on a node less busy than
        `limit`; and the other copy where there is exactly one, -1 where `copies` must tell."""
        count = self.copy_count[adapter]
        if not self._count:
            return count > 1, np.full(len(e), -1)
        paired = self._pair[adapter] & (count == 2) & (e < self._count)
        # The copies of a pair are neighbours, and `_ends` is behind the second.
        other = np.where(paired, 2 * self._ends[adapter] - 3 - e, 0)
        paired &= (self._start.adapter[other] == adapter) & (self._share[other] != GONE)
        busy = self.load[self._start.node[other]] >= limit
        return np.asarray((count > 1) & ~(paired & busy)), np.where(paired, other, -1)

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

    def added_load(self, adapter: int, features: Floats) -> Floats:
        """[nodes]: their utilisation if each got `features` of the adapter."""
        if not self.p.load.padded:
            return np.asarray(self.load + features[0] / self.p.capacity)
        ranks = np.minimum(np.maximum(self.ranks, self.p.rank[adapter]), MAX_RANK)
        work = ((self._features + features[:, None]) * self.weights[ranks].T).sum(axis=0)
        return np.asarray(work / self.p.capacity)

    def may_take(self, adapter: int, besides: Iterable[int], free: Ints | None = None) -> Bools:
        """[nodes]: whether a new copy is allowed and fits. `besides`: the nodes whose copies stay;
        a new one must be in another failure domain while those are in too few. `free` stands in for
        the free memory."""
        p = self.p
        room = self.free if free is None else free
        good = (room >= p.size_bytes[adapter]) & self._allow(int(p.rank[adapter]))
        for n in self._forbidden.get(adapter, ()):
            good[n] = False
        besides = list(besides)
        good[besides] = False
        if p.replicas > 1 and len(besides) < 2 * p.replicas:
            domains = {int(p.domain[n]) for n in besides}
            if len(domains) < p.replicas:
                for d in domains:
                    good[self._domain(d)] = False
        return np.asarray(good)

    def _allow(self, rank: int) -> Bools:
        """[nodes]: whether the node allows the rank."""
        if rank not in self._allowing:
            self._allowing[rank] = self.p.rank_limit >= rank
        return self._allowing[rank]

    def _domain(self, domain: int) -> Ints:
        """Its nodes."""
        if domain not in self._together:
            self._together[domain] = np.flatnonzero(self.p.domain == domain)
        return self._together[domain]

    # Changing

    def set_share(self, e: int, share: float) -> None:
        """`GONE` drops the copy."""
        if e < self._count:
            adapter, node, old = self._adapters[e], self._nodes[e], self._shares[e]
            self._shares[e] = share
        else:
            new = e - self._count
            adapter, node, old = self._new_adapter[new], self._new_node[new], self._new_share[new]
            self._new_share[new] = share
        if share == GONE:
            self.free[node] += self.p.size_bytes[adapter]
            self.copy_count[adapter] -= 1
        self._account(adapter, node, max(old, 0.0), max(share, 0.0))

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
        return e

    def _account(self, adapter: int, node: int, old: float, new: float) -> None:
        seen, sums = self._seen[adapter], self._sums
        reads = self._read[adapter] * (math.exp(-seen * old) - math.exp(-seen * new))
        if self._active[adapter] and (old > 0) != (new > 0):
            self._count_rank(adapter, node, 1 if new > 0 else -1)
        if len(sums) == 1:
            total = sums[0][node] + self._linear[0][adapter] * (new - old) + reads
            sums[0][node] = total
            self._loads[node] = total / self._capacity[node]
            return
        for column, linear in zip(sums, self._linear, strict=True):
            column[node] += linear[adapter] * (new - old)
        sums[-1][node] += reads
        weights = self.weights[min(int(self.ranks[node]), MAX_RANK)]
        work = float(self._features[:, node] @ weights)
        self._loads[node] = work / self._capacity[node]

    def _count_rank(self, adapter: int, node: int, by: int) -> None:
        """One entry with demand more or less."""
        ranks, of, begin = self._class_ranks, self._class_of[adapter], node * len(self._class_ranks)
        self._busy[begin + of] += by
        if by > 0:
            if self.ranks[node] < ranks[of]:
                self.ranks[node] = ranks[of]
        elif not self._busy[begin + of] and self.ranks[node] == ranks[of]:
            lower = range(of + 1, len(ranks))
            left = next((k for k in lower if self._busy[begin + k]), None)
            self.ranks[node] = 0 if left is None else ranks[left]

    def entries(self) -> Entries:
        """The plan as it is now."""
        adapter = np.r_[self._start.adapter, np.array(self._new_adapter, np.int64)]
        node = np.r_[self._start.node, np.array(self._new_node, np.int64)]
        share = np.r_[self._share, np.array(self._new_share)]
        keep = share != GONE
        if not len(self._new_adapter):
            return Entries(adapter[keep], node[keep], np.maximum(share[keep], 0.0))
        return Entries.of(adapter[keep], node[keep], np.maximum(share[keep], 0.0))
