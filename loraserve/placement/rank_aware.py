"""`rank_aware`, the default: lowest predicted peak utilisation, then least interference between
ranks, then fewest bytes moved.

Without a placement to start from, the candidates are rank-sorted fills, rebalanced, and `paper`.
With one it is repaired: what is held stays, nodes over the trigger are relieved to the goal, both
a little over the lowest level that is possible (hysteresis: between the two nothing moves). Only
where that ends far above the level, or above `paper`'s plan, is the cluster planned anew. So the
predicted peak is never above that of `paper` under the same limits, as long as no byte budget
forbids to follow it.
"""

import numpy as np

from loraserve.placement.bases import by_base
from loraserve.placement.columns import (
    Columns,
    Plan,
    bytes_moved,
    interference,
    peak,
    utilisation,
)
from loraserve.placement.fill import fill_level, fills
from loraserve.placement.limits import settle
from loraserve.placement.paper import packed, paper
from loraserve.placement.rebalance import Aim, rebalance
from loraserve.placement.relabel import relabel

# Of the lowest level: a repair begins above the trigger and ends at the goal.
TRIGGER = 1.08
GOAL = 1.04
# A fresh plan is polished to this.
POLISHED = 1.002
POLISHED_LARGE = 1.01
# A repair that ends above this is compared with a fresh plan, which must then be this much better.
# A fresh plan of a large cluster costs several repairs, so it is asked for later.
REPLAN_ABOVE = 1.15
REPLAN_ABOVE_LARGE = 1.4
REPLAN_GAIN = 0.95
# Peaks nearer than this count as equal, and interference decides.
SAME_PEAK = 1.01
# On larger clusters `paper` is judged before its relabelling, which takes longer than the rest.
RELABEL_UP_TO = 128


@by_base
def rank_aware(p: Columns) -> Plan:
    """See the module."""
    plan = _planned(p)
    if p.replicas < 2 and not plan.reasons:
        return plan
    # What moved last left room, for a copy or for an adapter that had none.
    return settle(p, plan.entries, spread_idle=True)


def _planned(p: Columns) -> Plan:
    level = fill_level(p)
    if not len(p.current):
        return _fresh(p, level)
    kept = settle(p, p.current)
    # Padding that the memory forces on a plan is no node's fault: aim at the mean then.
    mean = float(utilisation(p, kept.entries) @ p.capacity / p.capacity.sum())
    aim_at = max(level, mean)
    repaired = _repair(p, kept, aim_at)
    now = peak(p, repaired.entries)
    above = REPLAN_ABOVE_LARGE if p.nodes > RELABEL_UP_TO else REPLAN_ABOVE
    # Against the level, not the aim: ranks that share nodes raise the mean, which then looks as if
    # it could not be lower.
    if now > above * level or repaired.reasons:
        fresh = _fresh(p, level)
        fewer = len(fresh.reasons) - len(repaired.reasons)
        gain = fewer < 0 or (fewer == 0 and peak(p, fresh.entries) < REPLAN_GAIN * now)
        if gain and _affordable(p, fresh):
            return fresh
    return _no_worse_than_paper(p, repaired, now)


def _repair(p: Columns, kept: Plan, level: float) -> Plan:
    """Relieves busy nodes of what is held, new adapters included."""
    spent = bytes_moved(p, kept.entries) if p.byte_budget is not None else 0
    left = None if p.byte_budget is None else max(0, p.byte_budget - spent)
    aim = Aim(TRIGGER * level + 1e-9, GOAL * level + 1e-9, left)
    return Plan(rebalance(p, kept.entries, aim), kept.reasons)


def _affordable(p: Columns, plan: Plan) -> bool:
    return p.byte_budget is None or bytes_moved(p, plan.entries) <= p.byte_budget


def _no_worse_than_paper(p: Columns, plan: Plan, now: float) -> Plan:
    """`plan`, relieved further, or `paper`'s where even that is worse."""
    # The cheap bound first.
    if p.nodes > RELABEL_UP_TO and (
        now <= peak(p, packed(p, leftovers=False)) or now <= peak(p, packed(p))
    ):
        return plan
    other = paper(p)
    if len(other.reasons) > len(plan.reasons):
        return plan
    rival = peak(p, other.entries)
    for part in (0.99, 0.96):
        if now <= rival:
            return plan
        left = None
        if p.byte_budget is not None:
            left = max(0, p.byte_budget - bytes_moved(p, plan.entries))
        plan = Plan(rebalance(p, plan.entries, Aim(rival, part * rival, left)), plan.reasons)
        now = peak(p, plan.entries)
    return plan if now <= rival or not _affordable(p, other) else other


def _fresh(p: Columns, level: float) -> Plan:
    """The best of the candidates."""
    large = p.nodes > RELABEL_UP_TO
    to = (POLISHED_LARGE if large else POLISHED) * level + 1e-9
    candidates = [settle(p, relabel(p, wish)) for wish in fills(p)]
    if large:
        candidates = [min(candidates, key=lambda c: (len(c.reasons), peak(p, c.entries)))]
    aim = Aim((1.02 if large else POLISHED) * level + 1e-9, to)
    candidates = [Plan(rebalance(p, c.entries, aim), c.reasons) for c in candidates]
    peaks = [peak(p, c.entries) for c in candidates]
    if large and not any(c.reasons for c in candidates):
        best = min(peaks)
        if best <= peak(p, packed(p, leftovers=False)) or best <= peak(p, packed(p)):
            return candidates[peaks.index(best)]
    other = paper(p)
    if not large:
        candidates.append(Plan(rebalance(p, other.entries, aim), other.reasons))
    candidates.append(other)
    peaks = [peak(p, c.entries) for c in candidates]
    fewest = min(len(c.reasons) for c in candidates)
    good = [i for i, c in enumerate(candidates) if len(c.reasons) == fewest]
    best = min(peaks[i] for i in good)
    rival = peaks[-1] if len(other.reasons) == fewest else np.inf
    good = [i for i in good if peaks[i] <= max(best, min(SAME_PEAK * best, rival))]
    rank = {
        i: (round(interference(p, candidates[i].entries), 1), bytes_moved(p, candidates[i].entries))
        for i in good
    }
    return candidates[min(good, key=lambda i: (rank[i], i))]
