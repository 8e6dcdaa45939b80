"""Small steps that the limits are built of: what fits into a node's memory, shares summing to 1."""

from typing import TypeVar

import numpy as np

from loraserve.placement.arrays import Bools, Floats, Ints
from loraserve.placement.columns import Columns, Entries, entry_keys

# Passes over an overfull node: each lets in smaller copies behind one that does not fit.
ROUNDS = 4

Numbers = TypeVar("Numbers", Ints, Floats)


def joined(a: Entries, b: Entries) -> Entries:
    return Entries.of(
        np.concatenate([a.adapter, b.adapter]),
        np.concatenate([a.node, b.node]),
        np.concatenate([a.share, b.share]),
    )


def largest_share(p: Columns, entries: Entries) -> Bools:
    """Of each adapter its entry with the largest share; the first of equals."""
    single = entries.counts(p.adapters)[entries.adapter] == 1
    first = single.copy()
    many = np.flatnonzero(~single)
    if len(many):
        order = many[np.lexsort((-entries.share[many], entries.adapter[many]))]
        adapters = entries.adapter[order]
        first[order[np.r_[True, adapters[1:] != adapters[:-1]]]] = True
    return np.asarray(first)


def shares_to_one(p: Columns, entries: Entries) -> Entries:
    """Scales each adapter's shares to sum to 1; where they are all 0 the first copy gets it."""
    total = np.bincount(entries.adapter, entries.share, minlength=p.adapters)[entries.adapter]
    share = np.divide(entries.share, total, out=np.zeros(len(entries)), where=total > 0)
    starts = np.r_[True, entries.adapter[1:] != entries.adapter[:-1]][: len(entries)]
    share[starts & (total <= 0)] = 1.0
    return Entries(entries.adapter, entries.node, share)


def admit(p: Columns, free: Ints, adapter: Ints, node: Ints) -> Bools:
    """Which of the copies fit; takes their bytes off `free`. Where not all fit on a node, copies
    that are there already go first, then those with the most demand, then small ones."""
    size = p.size_bytes[adapter]
    need = np.bincount(node, size, minlength=p.nodes)
    good = need[node] <= free[node]
    over = np.flatnonzero(~good)
    free -= np.where(need <= free, need, 0).astype(np.int64)
    if not len(over):
        return good
    here = np.isin(adapter[over] * p.nodes + node[over], entry_keys(p, p.current))
    order = over[np.lexsort((size[over], -p.alone[adapter[over]], ~here, node[over]))]
    for _ in range(ROUNDS):
        sizes, places = size[order], node[order]
        fits = segment_sums(sizes, places) <= free[places]
        good[order[fits]] = True
        free -= np.bincount(places[fits], sizes[fits], minlength=p.nodes).astype(np.int64)
        order = order[~fits & (sizes <= free[places])]
    return good


def segment_sums(values: Numbers, segment: Ints) -> Numbers:
    """Running sums that begin anew where `segment` changes."""
    sums = np.cumsum(values)
    starts = np.flatnonzero(np.r_[True, segment[1:] != segment[:-1]][: len(segment)])
    before = sums[starts] - values[starts]
    return sums - np.repeat(before, np.diff(np.r_[starts, len(values)]))
