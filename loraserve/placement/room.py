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
    starts = first_of_each(entries.adapter)
    if starts.all():
        return starts
    begin = np.flatnonzero(starts)
    most = np.maximum.reduceat(entries.share, begin)
    largest = entries.share == np.repeat(most, np.diff(np.r_[begin, len(starts)]))
    at = np.flatnonzero(largest)
    largest[at] = first_of_each(entries.adapter[at])
    return np.asarray(largest)


def first_of_each(adapter: Ints) -> Bools:
    """Where another adapter begins in a column of sorted ones."""
    starts = np.ones(len(adapter), np.bool_)
    np.not_equal(adapter[1:], adapter[:-1], out=starts[1:])
    return starts


def shares_to_one(p: Columns, entries: Entries) -> Entries:
    """Scales each adapter's shares to sum to 1; where they are all 0 the first copy gets it."""
    total = np.bincount(entries.adapter, entries.share, minlength=p.adapters)[entries.adapter]
    share = np.divide(entries.share, total, out=np.zeros(len(entries)), where=total > 0)
    starts = first_of_each(entries.adapter)
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


def heaviest_first(of: Ints, weight: Floats) -> Ints:
    """Rows by their class (small whole numbers), within one by falling weight (at least 0), then by
    row. Weights that are equal to 9 digits count as equal (up to 2^20 rows of 2^9 classes): class,
    weight and row in one word are sorted fifteen times as fast as by two stable sorts."""
    rows = len(of)
    row_bits, class_bits = rows.bit_length(), int(of.max(initial=0)).bit_length()
    weight_bits = 64 - row_bits - class_bits
    # The bits of floats that are not negative rise with them; the sign takes none.
    falling = ~np.abs(weight).view(np.uint64) & np.uint64((1 << 63) - 1)
    keys = falling >> np.uint64(max(0, 63 - weight_bits))
    keys |= of.astype(np.uint64) << np.uint64(weight_bits)
    keys <<= np.uint64(row_bits)
    keys |= np.arange(rows, dtype=np.uint64)
    keys.sort()
    keys &= np.uint64((1 << row_bits) - 1)
    return keys.astype(np.int64)
