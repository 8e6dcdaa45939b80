"""`paper`: placement by rank budgets from operating points, as described.

The text of the paper's algorithm was not available to us; this follows the description of a
third-party reconstruction, with decisions of our own where that leaves something open:

1. rankUtil[r] = sum of TPS over adapters of rank r / OP[r]; targetUtil = sum rankUtil / servers.
2. budget[r] = servers of rank r = rankUtil[r] / targetUtil, rounded by largest remainder so that
   the budgets sum to the servers (ours).
3. Fractional packing within each rank's servers, by falling demand, up to targetUtil of OP[r].
4. Leftovers (overflow, and ranks without a server) in falling rank go to servers whose maximum
   rank is at least theirs, least utilised first; where there are none, to the least utilised one.
   Load is charged by OP[the server's maximum rank] (ours: raw tokens under-count low ranks).
5. Servers are relabelled so that fewest bytes move (ours: the description counts adapters).

Beyond the description: an adapter without demand counts a little, so that it gets a server too;
slower servers count by their speed; and the plan is made to obey the limits (`limits.py`)."""

import heapq

import numpy as np

from loraserve.placement.arrays import Floats, Ints
from loraserve.placement.bases import by_base
from loraserve.placement.columns import Columns, Entries, Plan
from loraserve.placement.limits import settle
from loraserve.placement.operating_point import MAX_RANK
from loraserve.placement.relabel import relabel
from loraserve.placement.room import heaviest_first, segment_sums

# All adapters without demand together count as this part of the demand.
IDLE_PART = 0.001


@by_base
def paper(p: Columns) -> Plan:
    """Rank budgets, fractional packing, leftovers, relabelling."""
    return settle(p, relabel(p, packed(p)))


def packed(p: Columns, leftovers: bool = True) -> Entries:
    """The plan before relabelling and limits. Without leftovers (step 4) its peak is a lower bound
    of the plan's: more adapters on a node never make it less busy. It is not sorted then."""
    tps = p.prefill + p.decode
    total = float(tps.sum())
    idle = tps <= 0
    if idle.any():
        tps = np.where(idle, (total * IDLE_PART or 1.0) / float(idle.sum()), tps)
    points = p.load.points.tokens_per_s
    points = np.asarray(np.maximum(points, points.max() * 1e-3))
    ranks, of = p.rank_classes
    point = points[np.minimum(ranks, MAX_RANK)]
    util = np.bincount(of, tps, minlength=len(ranks)) / point
    target = float(util.sum() / p.capacity.sum())
    servers = np.lexsort((-p.capacity, -p.rank_limit))
    budget = largest_remainder(util, p.nodes)
    begin = np.cumsum(budget) - budget
    order = heaviest_first(of, tps)
    group = [servers[b : b + n] for b, n in zip(begin, budget, strict=True)]
    line = segment_sums((tps / point[of])[order], of[order])
    found: list[tuple[Ints, Ints, Floats]] = []
    leftover: list[tuple[int, float]] = []
    bounds = np.searchsorted(of[order], np.arange(len(ranks) + 1))
    for k, nodes in enumerate(group):
        rows = order[bounds[k] : bounds[k + 1]]
        ends = line[bounds[k] : bounds[k + 1]]
        if not len(nodes):
            leftover += [(a, 1.0) for a in rows.tolist()]
            continue
        # The last border takes what rounding leaves over.
        borders = np.cumsum(p.capacity[nodes]) * target * (1 + 1e-9)
        pieces = _cut(ends, borders)
        inside = pieces[1] < len(nodes)
        found.append((rows[pieces[0][inside]], nodes[pieces[1][inside]], pieces[2][inside]))
        if leftovers:
            outside = zip(
                rows[pieces[0][~inside]].tolist(), pieces[2][~inside].tolist(), strict=True
            )
            leftover += [x for x in outside if x[1] > 1e-9]
    adapter = np.concatenate([f[0] for f in found] or [np.zeros(0, np.int64)])
    node = np.concatenate([f[1] for f in found] or [np.zeros(0, np.int64)])
    share = np.concatenate([f[2] for f in found] or [np.zeros(0)])
    top = np.full(p.nodes, -1, np.int64)
    top[servers] = np.repeat(ranks, budget)
    tokens = np.asarray(np.bincount(node, tps[adapter] * share, minlength=p.nodes), np.float64)
    if not leftovers:
        return Entries(adapter, node, share)
    more = _leftovers(p, leftover, tps, points, top, tokens)
    return _merged(p, np.r_[adapter, more[0]], np.r_[node, more[1]], np.r_[share, more[2]])


def largest_remainder(quota: Floats, seats: int) -> Ints:
    """Whole numbers in proportion to `quota` that sum to `seats` (Hamilton's method)."""
    total = float(quota.sum())
    exact = quota * (seats / total) if total > 0 else np.zeros(len(quota))
    whole = np.floor(exact + 1e-9).astype(np.int64)
    rest = np.argsort(-(exact - whole), kind="stable")[: seats - int(whole.sum())]
    whole[rest] += 1
    return whole


def _cut(ends: Floats, borders: Floats) -> tuple[Ints, Ints, Floats]:
    """Adapters that lie one after the other up to `ends`, cut at `borders`: (adapter, bin, share);
    bin len(borders) is behind the last."""
    begins = np.r_[0.0, ends[:-1]]
    first = np.searchsorted(borders, begins, side="right")
    last = np.maximum(np.searchsorted(borders, ends, side="left"), first)
    count = np.asarray(last - first + 1, np.int64)
    adapter = np.repeat(np.arange(len(ends)), count)
    inner = np.arange(len(adapter)) - np.repeat(np.cumsum(count) - count, count)
    bin_ = np.asarray(first, np.int64)[adapter] + inner
    low = np.maximum(begins[adapter], np.r_[0.0, borders][bin_])
    high = np.minimum(ends[adapter], np.r_[borders, np.inf][bin_])
    length = np.maximum(ends - begins, 1e-300)[adapter]
    share = np.where(count[adapter] == 1, 1.0, np.clip((high - low) / length, 0.0, 1.0))
    return adapter, bin_, share


def _leftovers(
    p: Columns,
    leftover: list[tuple[int, float]],
    tps: Floats,
    points: Floats,
    top: Ints,
    tokens: Floats,
) -> tuple[Ints, Ints, Floats]:
    """Step 4: (adapters, nodes, shares). `top` and `tokens` of the nodes change with it."""
    rank = p.rank.tolist()
    point: list[float] = points.tolist()
    speed, limit = p.capacity.tolist(), p.rank_limit.tolist()
    tops, sums = top.tolist(), tokens.tolist()

    def busy(n: int) -> float:
        return float(sums[n] / point[min(max(tops[n], 0), MAX_RANK)] / speed[n])

    by_top = sorted(range(p.nodes), key=lambda n: -tops[n])
    heap: list[tuple[float, int]] = []
    rate = [1.0] * p.nodes  # tokens/s at the operating point, of the nodes in the heap
    tokens_of = tps.tolist()
    leftover.sort(key=lambda x: (-rank[x[0]], -tokens_of[x[0]] * x[1]))
    joined = 0
    nodes = []
    for a, share in leftover:
        while joined < p.nodes and tops[by_top[joined]] >= rank[a]:
            n = by_top[joined]
            rate[n] = point[min(max(tops[n], 0), MAX_RANK)] * speed[n]
            heapq.heappush(heap, (busy(n), n))
            joined += 1
        if heap and limit[heap[0][1]] >= rank[a]:
            n = heap[0][1]
            sums[n] += tokens_of[a] * share
            heapq.heapreplace(heap, (sums[n] / rate[n], n))
        else:
            able = [x for x in range(p.nodes) if limit[x] >= rank[a]] or range(p.nodes)
            n = min(able, key=lambda x: (busy(x), x))
            sums[n] += tokens_of[a] * share
            if tops[n] < rank[a]:
                tops[n] = rank[a]
                if n in by_top[joined:]:
                    by_top.remove(n)
                    by_top.insert(joined, n)
        nodes.append(n)
    return (
        np.array([a for a, _ in leftover], np.int64),
        np.array(nodes, np.int64),
        np.array([s for _, s in leftover]),
    )


def _merged(p: Columns, adapter: Ints, node: Ints, share: Floats) -> Entries:
    """Pieces of one adapter on one node become one."""
    keys = adapter * p.nodes + node
    order = np.argsort(keys, kind="stable")
    keys, share = keys[order], share[order]
    new = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]][: len(keys)])
    if not len(new):
        return Entries.none()
    return Entries(keys[new] // p.nodes, keys[new] % p.nodes, np.add.reduceat(share, new))
