"""Which node plays which part of a new plan: the assignment that moves fewest bytes.

Small clusters get the optimum by shortest augmenting paths (Jonker and Volgenant, Computing 38,
1987); large ones a greedy assignment by falling overlap, improved by exchanges of pairs."""

from dataclasses import dataclass

import numpy as np

from loraserve.placement.arrays import Floats, Ints
from loraserve.placement.columns import Columns, Entries

EXACT_UP_TO = 96
EXCHANGE_ROUNDS = 8


def assign(gain: Floats) -> Ints:
    """[rows]: a column for each row so that the sum of gains is highest; exact."""
    count = len(gain)
    cost = gain.max(initial=0.0) - gain
    row_of = np.full(count + 1, -1, np.int64)  # of each column; the last is a start for paths
    u, v = np.zeros(count), np.zeros(count + 1)
    for row in range(count):
        row_of[count] = row
        column = count
        distance = np.full(count, np.inf)
        before = np.full(count, count, np.int64)
        done = np.zeros(count + 1, np.bool_)
        while row_of[column] >= 0:
            done[column] = True
            at = row_of[column]
            reduced = cost[at] - u[at] - v[:count]
            open_ = ~done[:count]
            better = open_ & (reduced < distance)
            distance[better] = reduced[better]
            before[better] = column
            nearest = int(np.argmin(np.where(open_, distance, np.inf)))
            step = distance[nearest]
            u[row_of[done]] += step
            v[done] -= step
            distance[open_] -= step
            column = nearest
        while column != count:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    out = np.empty(count, np.int64)
    out[row_of[:count]] = np.arange(count)
    return out


def assign_greedily(gain: Floats) -> Ints:
    """The same for large problems, near the optimum."""
    count = len(gain)
    out = np.full(count, -1, np.int64)
    used = np.zeros(count, np.bool_)
    rows, columns = np.nonzero(gain > 0)
    for at in np.argsort(-gain[rows, columns], kind="stable").tolist():
        r, c = rows[at], columns[at]
        if out[r] < 0 and not used[c]:
            out[r], used[c] = c, True
    out[out < 0] = np.flatnonzero(~used)
    for _ in range(EXCHANGE_ROUNDS):
        now = gain[np.arange(count), out]
        swapped = gain[:, out]  # row i with the column of row j
        profit = swapped + swapped.T - now[:, None] - now[None, :]
        partner = np.argmax(profit, axis=1)
        best = profit[np.arange(count), partner]
        changed = np.zeros(count, np.bool_)
        for i in np.argsort(-best).tolist():
            j = int(partner[i])
            if best[i] <= 1e-9 or changed[i] or changed[j]:
                continue
            out[i], out[j] = out[j], out[i]
            changed[[i, j]] = True
        if not changed.any():
            break
    return out


@dataclass(frozen=True)
class _Kind:
    """Nodes with the same speed, memory and rank limit can take each other's part."""

    nodes: Ints


def _kinds(p: Columns) -> list[_Kind]:
    table = np.column_stack([p.memory.astype(np.float64), p.rank_limit, p.speed])
    _, of = np.unique(table, axis=0, return_inverse=True)
    return [_Kind(np.flatnonzero(of.ravel() == k)) for k in range(int(of.max()) + 1)]


def relabel(p: Columns, entries: Entries) -> Entries:
    """`entries` with nodes exchanged for ones alike, so that most bytes are where they are."""
    if not len(p.current):
        return entries
    new_node = np.arange(p.nodes)
    for kind in _kinds(p):
        if len(kind.nodes) < 2:
            continue
        gain = _overlap(p, entries, kind.nodes)
        exact = len(kind.nodes) <= EXACT_UP_TO
        new_node[kind.nodes] = kind.nodes[(assign if exact else assign_greedily)(gain)]
    return Entries.of(entries.adapter, new_node[entries.node], entries.share)


def _overlap(p: Columns, entries: Entries, nodes: Ints) -> Floats:
    """[parts, nodes]: bytes of a part of the plan that the node has already."""
    at = np.full(p.nodes, -1, np.int64)
    at[nodes] = np.arange(len(nodes))
    now = p.current.where(at[p.current.node] >= 0)
    new = entries.where(at[entries.node] >= 0)
    counts = now.counts(p.adapters)
    begin = np.cumsum(counts) - counts
    repeats = counts[new.adapter]
    total = int(repeats.sum())
    inner = np.arange(total) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    held = now.node[np.repeat(begin[new.adapter], repeats) + inner]
    pair = at[np.repeat(new.node, repeats)] * len(nodes) + at[held]
    size = np.repeat(p.size_bytes[new.adapter], repeats)
    gain = np.bincount(pair, size, minlength=len(nodes) ** 2)
    return gain.reshape(len(nodes), len(nodes)).astype(np.float64)
