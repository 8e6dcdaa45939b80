"""Rank-sorted fractional fill: adapters by falling rank fill one node after the other up to one
level of utilisation, so that neighbours in rank share a node and at most one adapter per border is
split.

For equal nodes and no memory limit this is optimal in whole ranks: a node that serves rank r may
serve any lower rank, so the fewest nodes for the highest ranks leave most for the others, and a
border node's rest goes to the next rank (exchange argument). Nodes that allow fewer ranks come
last.
"""

from dataclasses import dataclass

import numpy as np

from loraserve.placement.arrays import Bools, Floats, Ints
from loraserve.placement.columns import Columns, Entries
from loraserve.placement.operating_point import MAX_RANK
from loraserve.placement.room import heaviest_first, segment_sums

# Idle adapters are spread by bytes as if they made this part of the whole load.
IDLE_PART = 0.005
# Of a node's memory, what the fill plans with: packing is not perfect.
FILLED = 0.95
# A piece of a split adapter below this utilisation goes to the larger piece.
LEAST_PIECE = 0.002
BISECTIONS = 14


@dataclass(frozen=True, eq=False)
class Classes:
    """Adapters by rank, highest first."""

    rows: Ints
    """Of the adapters that are meant; the columns below are theirs."""
    ranks: list[int]
    of: Ints
    """The class of each."""
    weight: Floats
    """Utilisation alone, plus the idle part by bytes."""
    cost: list[list[float]]
    """[class][class]: of all adapters of the first on nodes of the second's rank."""
    size: list[float]
    """[class]: bytes of all its adapters."""


def classes_of(p: Columns, rows: Ints) -> Classes:
    ranks, of = p.rank_classes
    if len(rows) < p.adapters:
        there = np.bincount(of[rows], minlength=len(ranks)) > 0
        ranks, of = ranks[there], (np.cumsum(there) - 1)[of[rows]]
    count = len(ranks)
    alone, size = p.alone[rows], p.size_bytes[rows]
    total, bytes_ = float(p.alone.sum()), float(p.size_bytes.sum()) + 1.0
    idle = np.maximum(size, 1) * ((IDLE_PART * total if total > 0 else 1e-3 * p.nodes) / bytes_)
    if p.load.padded:
        whole = np.ones(len(rows))
        features = p.charges.features(rows, whole)
        sums = np.stack([np.bincount(of, f, minlength=count) for f in features.T], axis=1)
        cost = sums @ p.charges.weights[np.minimum(ranks, MAX_RANK)].T
    else:
        cost = np.repeat(np.bincount(of, alone, minlength=count)[:, None], count, axis=1)
    cost += np.bincount(of, idle, minlength=count)[:, None]
    sizes = np.bincount(of, size, minlength=count)
    return Classes(rows, ranks.tolist(), of, alone + idle, cost.tolist(), sizes.tolist())


def _one_class(p: Columns, classes: Classes) -> Classes:
    """All adapters as if they had the highest rank."""
    size, cost = sum(classes.size), sum(row[0] for row in classes.cost)
    return Classes(
        classes.rows, [0], np.zeros(p.adapters, np.int64), classes.weight, [[cost]], [size]
    )


def lowest_level(p: Columns) -> float:
    """No plan has a lower peak: the load at own ranks over the nodes that may serve it."""
    limits = np.unique(np.r_[-1, p.rank_limit])[:-1]
    charge = [float(p.alone[p.rank > limit].sum()) for limit in limits]
    capacity = [float(p.capacity[p.rank_limit > limit].sum()) for limit in limits]
    return max(c / k for c, k in zip(charge, capacity, strict=True))


Segment = tuple[int, int, float]  # node, class, part of the class


def _walk(
    p: Columns, classes: Classes, room: Floats, order: list[int], memory: Floats | None
) -> list[Segment] | None:
    """Fills each node with `room` of utilisation, in units of a node of speed 1; None where the
    adapters do not fit."""
    segments: list[Segment] = []
    ranks, cost, size = classes.ranks, classes.cost, classes.size
    rooms, limit = room.tolist(), p.rank_limit.tolist()
    bytes_ = None if memory is None else memory.tolist()
    k, left = 0, 1.0
    for n in order:
        rest, top = rooms[n], k
        bytes_left = bytes_[n] if bytes_ else 0.0
        while k < len(ranks) and rest > 0:
            if ranks[k] > limit[n]:
                return None
            part = min(left, rest / max(cost[k][top], 1e-300))
            if bytes_ and size[k] > 0:
                part = min(part, bytes_left / size[k])
            if part <= 1e-12:
                break
            segments.append((n, k, part))
            rest -= part * cost[k][top]
            bytes_left -= part * size[k]
            left -= part
            if left > 1e-9:
                break
            k, left = k + 1, 1.0
        if k == len(ranks):
            return segments
    return None


def fill_level(p: Columns) -> float:
    """The peak that a fill without memory limits reaches."""
    low = lowest_level(p)
    if not p.load.padded:
        return low
    classes = classes_of(p, np.arange(p.adapters))
    return _least_level(p, classes, low + 1e-12, _order(p), None)[0]


def fills(p: Columns) -> list[Entries]:
    """Wishes for every adapter, one way or two; which is better depends on the limits.

    Where one rank's adapters have more bytes for their load than nodes have memory, the coldest of
    them are put where bytes are left (`_hot_and_cold`); on an engine that pads, also: more nodes
    for that rank, less busy; and all ranks mixed, for memory so short that they must be."""
    low = lowest_level(p) * (1 + IDLE_PART) * (1 + 1e-9) + 1e-12
    classes = classes_of(p, np.arange(p.adapters))
    usable = _usable(p)
    density = float(usable.sum() / p.capacity.sum())
    hot = _hot(p, classes, density / low)
    found = []
    if p.load.padded and not hot.all():
        _, segments = _least_level(p, classes, low, _order(p), None)
        if segments:
            found.append(_spread(p, classes, segments))
            held = np.bincount(found[0].node, p.size_bytes[found[0].adapter], minlength=p.nodes)
            if p.replicas * held.max() <= p.memory.min():
                return found
        for kind in (classes, _one_class(p, classes)):
            _, segments = _least_level(p, kind, low, _order(p), usable)
            if segments:
                found.append(_spread(p, kind, segments))
    if hot.all():
        _, segments = _least_level(p, classes, low, _order(p), None)
        found += [_spread(p, classes, segments)] if segments else []
    else:
        found.append(_hot_and_cold(p, low, hot, usable))
    return found


def _order(p: Columns) -> list[int]:
    """Nodes that allow most ranks first, fast ones before slow ones."""
    return np.lexsort((-p.capacity, -p.rank_limit)).tolist()  # type: ignore[no-any-return]


def _usable(p: Columns) -> Floats:
    """[nodes]: bytes for first copies, so that all nodes keep about the same part free."""
    needed = float(p.size_bytes.sum()) * p.replicas / max(float(p.memory.sum()), 1.0)
    return np.asarray(p.memory * (max(min(FILLED, 1.03 * needed), needed) / p.replicas))


def _hot(p: Columns, classes: Classes, density: float) -> Bools:
    """[adapters]: whether the adapter is among those of its rank, densest in load first, whose
    bytes fit on the nodes that their load needs; `density` is bytes for a node's load of 1."""
    worth = classes.weight / np.maximum(p.size_bytes, 1)
    order = heaviest_first(classes.of, worth)
    load = segment_sums(classes.weight[order], classes.of[order])
    size = segment_sums(p.size_bytes[order].astype(np.float64), classes.of[order])
    hot = np.empty(p.adapters, np.bool_)
    hot[order] = size <= density * load
    return hot


def _hot_and_cold(p: Columns, level: float, hot: Bools, usable: Floats) -> Entries:
    """The hot by load, the cold by bytes into the memory that is left, and the hot again around
    the load of the cold."""
    rows, cold = np.flatnonzero(hot), np.flatnonzero(~hot)
    cold = cold[np.argsort(-p.rank[cold], kind="stable")]
    order = np.array(_order(p))
    classes = classes_of(p, rows)
    cold_load = float(p.alone[cold].sum())
    room = p.capacity * max(level - cold_load / float(p.capacity.sum()), 1e-9)
    wishes = Entries.none()
    node = np.zeros(0, np.int64)
    for _ in range(2):
        if len(rows):
            _, segments = _least_level(p, classes, 1.0, order.tolist(), None, room)
            if not segments:
                return Entries.none()
            wishes = _spread(p, classes, segments)
        held = np.bincount(wishes.node, p.size_bytes[wishes.adapter], minlength=p.nodes)
        ends = np.cumsum(np.maximum(usable - held, 0)[order])
        sizes = p.size_bytes[cold]
        middle = (np.cumsum(sizes) - sizes / 2) * (ends[-1] / max(float(sizes.sum()), 1.0))
        node = order[np.minimum(np.searchsorted(ends, middle), p.nodes - 1)]
        busy = np.bincount(node, p.alone[cold], minlength=p.nodes)
        room = np.maximum(level * p.capacity - busy, 1e-9)
    return Entries.of(
        np.r_[wishes.adapter, cold],
        np.r_[wishes.node, node],
        np.r_[wishes.share, np.ones(len(cold))],
    )


def _least_level(
    p: Columns,
    classes: Classes,
    low: float,
    order: list[int],
    memory: Floats | None,
    room: Floats | None = None,
) -> tuple[float, list[Segment] | None]:
    """The factor on `room` (default: the capacity), and the segments; by bisection between `low`
    and the first increase that works."""
    room = p.capacity if room is None else room
    segments = _walk(p, classes, low * room, order, memory)
    if segments:
        return low, segments
    high, increase, most = low, 1.02, 1e6 * low
    while high < most:
        low, high = high, high * increase
        increase = min(2.0, increase**2)
        segments = _walk(p, classes, high * room, order, memory)
        if segments:
            break
    else:
        return high, None
    for _ in range(BISECTIONS):
        if high - low < 5e-4 * high:
            break
        middle = (low + high) / 2
        found = _walk(p, classes, middle * room, order, memory)
        if found:
            high, segments = middle, found
        else:
            low = middle
    return high, segments


def _spread(p: Columns, classes: Classes, segments: list[Segment]) -> Entries:
    """Adapters onto the segments. Within a class, heavy and light ones are dealt out like cards,
    so that each node gets its part of both the load and the bytes."""
    node = np.array([s[0] for s in segments], np.int64)
    class_ = np.array([s[1] for s in segments], np.int64)
    part = np.array([s[2] for s in segments])
    hands = np.bincount(class_, minlength=len(classes.ranks))
    order = heaviest_first(classes.of, classes.weight)
    count = np.bincount(classes.of, minlength=len(hands))
    start = np.cumsum(count) - count
    of = classes.of[order]
    number = np.arange(len(order)) - start[of]
    hand = (np.cumsum(hands) - hands)[of] + number % hands[of]
    small = np.uint16 if len(segments) < 2**16 else np.int64
    order = order[np.argsort(hand.astype(small), kind="stable")]
    of = classes.of[order]
    # A line on which class k takes [k, k + 1), adapters and segments alike.
    weight = classes.weight[order]
    total = np.bincount(of, weight, minlength=len(hands))
    ends = np.cumsum(weight / total[of])
    ends_of_class = ends[np.cumsum(count) - 1]
    ends += of + 1 - ends_of_class[of]
    begins = np.r_[0.0, ends[:-1]]
    begins[start] = np.arange(len(hands))
    borders = np.cumsum(part)
    borders += class_ + 1 - borders[np.cumsum(hands) - 1][class_]
    first = np.minimum(np.searchsorted(borders, begins, side="right"), len(borders) - 1)
    last = np.maximum(np.searchsorted(borders, ends, side="left"), first)
    last = np.minimum(last, np.cumsum(hands)[of] - 1)
    pieces = last - first + 1
    adapter = np.repeat(order, pieces)
    segment = np.arange(len(adapter)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    segment += np.repeat(first, pieces)
    low = np.maximum(np.repeat(begins, pieces), np.r_[0.0, borders][segment])
    high = np.minimum(np.repeat(ends, pieces), borders[segment])
    length = np.repeat(np.maximum(ends - begins, 1e-300), pieces)
    share = np.clip((high - low) / length, 0.0, 1.0)
    share[np.repeat(pieces == 1, pieces)] = 1.0
    # Small pieces go to their adapter's largest.
    keep = np.repeat(pieces == 1, pieces)
    split = np.flatnonzero(~keep)
    keep[split] = share[split] * p.alone[classes.rows[adapter[split]]] >= LEAST_PIECE
    by_size = split[np.lexsort((-share[split], adapter[split]))]
    owner = adapter[by_size]
    keep[by_size[np.r_[True, owner[1:] != owner[:-1]][: len(owner)]]] = True
    return Entries.of(classes.rows[adapter[keep]], node[segment[keep]], share[keep])
