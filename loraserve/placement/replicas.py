"""Copies against failures: as many as wanted, in different failure domains where there is room.

They carry no share: a policy may give them one, and a lost node makes the others' shares grow.
"""

import numpy as np

from loraserve.placement.arrays import Bools, Ints
from loraserve.placement.columns import Columns, Entries, entry_keys, node_ranks
from loraserve.placement.room import admit, joined

# How far from the first copy, in nodes sorted by rank, each bulk round looks: near ones first, so
# that replicas of one rank share nodes; the last rounds look everywhere.
REACH = (32, 8, 1, 1, 1)
_ODD = 0x9E3779B97F4A7C15  # golden ratio, a usual multiplier for hashing integers


def replicate(p: Columns, free: Ints, entries: Entries) -> Entries:
    """Adds copies until every adapter has `p.replicas` of them, in as many domains as can be;
    `free` is the memory left, and shrinks."""
    domains = min(p.replicas, len(np.unique(p.domain)))
    for wanted, apart in ((domains, True), (min(p.replicas, p.nodes), False)):
        for _ in range(wanted - 1):
            have = _domains_held(p, entries) if apart else entries.counts(p.adapters)
            lacking = np.flatnonzero((have > 0) & (have < wanted))
            if not len(lacking):
                break
            added = _one_more(p, free, entries, lacking, apart)
            if not len(added):
                break
            entries = joined(entries, added)
    return entries


def _domains_held(p: Columns, entries: Entries) -> Ints:
    """[adapters]: failure domains that hold a copy."""
    counts = entries.counts(p.adapters)
    many = counts[entries.adapter] > 1
    if not many.any():
        return counts
    domain = p.domain[entries.node]
    two = np.flatnonzero(
        (entries.adapter[1:] == entries.adapter[:-1]) & (domain[1:] != domain[:-1])
    )
    apart = np.ones(p.adapters, np.int64)
    apart[entries.adapter[two]] = 2
    more = counts[entries.adapter] > 2
    if more.any():
        width = int(p.domain.max(initial=0)) + 1
        keys = np.unique(entries.adapter[more] * width + domain[more])
        apart[keys // width] = np.bincount(keys // width, minlength=p.adapters)[keys // width]
    return np.where(counts > 1, apart, counts)


class _Taken:
    """Which (adapter, node) and (adapter, domain) pairs hold a copy, of some adapters."""

    def __init__(self, p: Columns, entries: Entries, lacking: Ints, apart: bool) -> None:
        self._p, self._apart = p, apart
        chosen = np.zeros(p.adapters, np.bool_)
        chosen[lacking] = True
        held = entries.where(chosen[entries.adapter])
        self.first = np.full(p.adapters, -1, np.int64)
        self.first[held.adapter[::-1]] = held.node[::-1]
        # In columns: the k-th copy of each adapter.
        starts = np.flatnonzero(np.r_[True, held.adapter[1:] != held.adapter[:-1]][: len(held)])
        number = np.arange(len(held)) - np.repeat(starts, np.diff(np.r_[starts, len(held)]))
        self._nodes = np.full((int(number.max(initial=0)) + 1, p.adapters), -1, np.int64)
        self._nodes[number, held.adapter] = held.node

    def allows(self, adapter: Ints, node: Ints) -> Bools:
        good = np.ones(len(adapter), np.bool_)
        for column in self._nodes:
            held = column[adapter]
            if self._apart:
                good &= (held < 0) | (self._p.domain[held] != self._p.domain[node])
            else:
                good &= held != node
        return good


def _one_more(p: Columns, free: Ints, entries: Entries, lacking: Ints, apart: bool) -> Entries:
    """At most one copy more for each of the adapters."""
    taken = _Taken(p, entries, lacking, apart)
    found_a: list[Ints] = []
    found_n: list[Ints] = []

    def try_(adapter: Ints, node: Ints) -> Ints:
        """Takes what is allowed and fits; the adapters that got nothing."""
        good = p.able(adapter, node) & taken.allows(adapter, node)
        good[good] = admit(p, free, adapter[good], node[good])
        found_a.append(adapter[good])
        found_n.append(node[good])
        return adapter[~good]

    # Copies that are there already cost no bytes.
    wanted = np.zeros(p.adapters, np.bool_)
    wanted[lacking] = True
    spare = p.current.where(wanted[p.current.adapter])
    spare = spare.where(~np.isin(entry_keys(p, spare), entry_keys(p, entries)))
    if len(spare):
        good = taken.allows(spare.adapter, spare.node) & p.able(spare.adapter, spare.node)
        spare = spare.where(good)
        one = np.r_[True, spare.adapter[1:] != spare.adapter[:-1]][: len(spare)]
        try_(spare.adapter[one], spare.node[one])
        wanted[found_a[-1]] = False
        lacking = lacking[wanted[lacking]]
    order = np.lexsort((np.arange(p.nodes), -node_ranks(p, entries), -p.rank_limit))
    position = np.empty(p.nodes, np.int64)
    position[order] = np.arange(p.nodes)
    for number, part in enumerate(REACH):
        if not len(lacking) or p.nodes < 2:
            break
        reach = max(1, min(p.nodes - 1, max(8, p.nodes // part)))
        mixed = (lacking.astype(np.uint64) + np.uint64(number * 7919)) * np.uint64(_ODD)
        step = (mixed >> np.uint64(33)).astype(np.int64) % reach + 1
        lacking = try_(lacking, order[(position[taken.first[lacking]] + step) % p.nodes])
    everywhere = np.arange(p.nodes)
    for a in lacking.tolist():
        size = p.size_bytes[a]
        if size > free.max():
            continue
        same = np.full(p.nodes, a)
        good = p.able(same, everywhere) & (free >= size) & taken.allows(same, everywhere)
        if good.any():
            n = int(np.argmax(np.where(good, free, -1)))
            free[n] -= size
            found_a.append(np.array([a]))
            found_n.append(np.array([n]))
    adapter = np.concatenate(found_a) if found_a else np.zeros(0, np.int64)
    node = np.concatenate(found_n) if found_n else np.zeros(0, np.int64)
    return Entries.of(adapter, node, np.zeros(len(adapter)))
