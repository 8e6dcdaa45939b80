"""The limits that every policy obeys: a policy says where it would like adapters to be, `settle`
makes of it a plan within memory, ranks, forbidden pairs, replicas and failure domains.

First every adapter gets one copy (the wish with the largest share, else any node with room), then
the other wishes, then replicas. So a replica or a split never takes the last room of an adapter.
"""

import numpy as np

from loraserve.placement.arrays import Floats, Ints
from loraserve.placement.columns import (
    Columns,
    Entries,
    Plan,
    entry_keys,
    node_ranks,
    utilisation,
)
from loraserve.placement.replicas import replicate
from loraserve.placement.room import admit, joined, largest_share, shares_to_one

# Adapters without a home are spread in bulk while there are more than this, then one by one.
ONE_BY_ONE = 256
BULK_ROUNDS = 4


def settle(p: Columns, wish: Entries, spread_idle: bool = False) -> Plan:
    """All nodes serve the adapters' base, and every adapter has a node that could hold it alone.
    A wish may name a pair that is not allowed; it is passed over. Of an adapter without demand only
    the first wish counts unless `spread_idle`: more copies than replicas would serve nobody."""
    able = p.able(wish.adapter, wish.node)
    wish = wish if able.all() else wish.where(able)
    first = largest_share(p, wish)
    if not spread_idle:
        needed = first | p.active[wish.adapter]
        if not needed.all():
            wish, first = wish.where(needed), first[needed]
    used = np.bincount(wish.node, p.size_bytes[wish.adapter], minlength=p.nodes)
    free = p.memory.copy()
    if np.count_nonzero(first) == p.adapters and (used <= free).all():
        return _complete(p, free - used.astype(np.int64), wish, {})
    kept = first.copy()
    kept[first] = admit(p, free, wish.adapter[first], wish.node[first])
    housed, reasons = _house(p, free, wish.where(kept))
    rest = ~first
    if len(housed):
        rest &= ~np.isin(entry_keys(p, wish), entry_keys(p, housed))
    if reasons:
        rest &= ~np.isin(wish.adapter, np.fromiter(reasons, np.int64))
    taken = rest.copy()
    taken[rest] = admit(p, free, wish.adapter[rest], wish.node[rest])
    entries = wish.where(kept | taken)
    if len(housed):
        entries = joined(entries, housed)
    return _complete(p, free, entries, reasons)


def _complete(p: Columns, free: Ints, entries: Entries, reasons: dict[int, str]) -> Plan:
    """The plan with shares that sum to 1, and with replicas."""
    entries = shares_to_one(p, entries)
    if p.replicas > 1:
        entries = replicate(p, free, entries)
    return Plan(entries, reasons)


def _house(p: Columns, free: Ints, held: Entries) -> tuple[Entries, dict[int, str]]:
    """Copies for the adapters that have none, near to their own rank; and why some get none."""
    homeless = np.flatnonzero(held.counts(p.adapters) == 0)
    if not len(homeless):
        return Entries.none(), {}
    found_a: list[Ints] = []
    found_n: list[Ints] = []
    if len(homeless) > ONE_BY_ONE:
        nodes = np.lexsort((-node_ranks(p, held), -p.rank_limit))
        homeless = homeless[np.argsort(-p.rank[homeless], kind="stable")]
        for _ in range(BULK_ROUNDS):
            ends = np.cumsum(free[nodes])
            middle = np.cumsum(p.size_bytes[homeless]) - p.size_bytes[homeless] / 2
            scale = min(1.0, ends[-1] / max(1.0, float(p.size_bytes[homeless].sum())))
            # All over the room there is, not only the first nodes.
            spread = max(1.0, 0.9 * ends[-1] / max(1.0, float(p.size_bytes[homeless].sum())))
            at = np.minimum(np.searchsorted(ends, middle * scale * spread), p.nodes - 1)
            node = nodes[at]
            able = p.able(homeless, node)
            able[able] = admit(p, free, homeless[able], node[able])
            found_a.append(homeless[able])
            found_n.append(node[able])
            homeless = homeless[~able]
    seats, reasons = _one_by_one(p, free, held, homeless)
    found_a.append(seats.adapter)
    found_n.append(seats.node)
    adapter = np.concatenate(found_a)
    return Entries.of(adapter, np.concatenate(found_n), np.ones(len(adapter))), reasons


def _one_by_one(
    p: Columns, free: Ints, held: Entries, homeless: Ints
) -> tuple[Entries, dict[int, str]]:
    """Busy adapters go where the node is least utilised after, idle ones to the nearest rank."""
    if not len(homeless):
        return Entries.none(), {}
    load = utilisation(p, held)
    ranks = node_ranks(p, held)
    everywhere = np.arange(p.nodes)
    adapters, nodes = [], []
    reasons: dict[int, str] = {}
    homeless = homeless[np.lexsort((-p.size_bytes[homeless], -p.alone[homeless]))]
    for a in homeless.tolist():
        size = int(p.size_bytes[a])
        able = p.able(np.full(p.nodes, a), everywhere) & (free >= size)
        if not able.any():
            reasons[a] = f"no node has {size} bytes of adapter memory left"
            continue
        used: Floats = 1 - free / np.maximum(p.memory, 1)
        if p.alone[a] > 0:
            score = load + p.alone[a] / p.capacity + 1e-6 * used
        else:
            score = np.abs(ranks - p.rank[a]) + used
        n = int(np.argmin(np.where(able, score, np.inf)))
        free[n] -= size
        load[n] += p.alone[a] / p.capacity[n]
        ranks[n] = max(ranks[n], p.rank[a]) if p.alone[a] > 0 else ranks[n]
        adapters.append(a)
        nodes.append(n)
    return Entries.of(adapters, nodes, np.ones(len(adapters))), reasons
