"""How many nodes the demand wants, and why: the autoscale signal."""

import math
from dataclasses import dataclass, replace

import numpy as np

from loraserve.placement.columns import Columns, Entries
from loraserve.placement.fill import fill_level

# Of the SLO's limit: what is left is for bursts within an interval and for a lost node.
TARGET_UTILISATION = 0.8
MOST_NODES = 1_000_000


@dataclass(frozen=True)
class WantedNodes:
    """`nodes` of the kind that the cluster has now."""

    nodes: int
    reason: str


def wanted_nodes(p: Columns, target: float = TARGET_UTILISATION) -> WantedNodes:
    """The fewest nodes like the median one of the cluster that keep the peak at `target`, hold all
    copies, and give each replica a node. Without nodes there is nothing to measure by: 1, where
    there are adapters. For one base; callers with several ask for each."""
    if not p.adapters:
        return WantedNodes(0, "no adapters")
    if not p.nodes:
        return WantedNodes(1, "there are adapters and no node")
    copies = math.ceil(
        float(p.size_bytes.sum()) * p.replicas / max(1.0, float(np.median(p.memory)))
    )
    load = _by_load(p, target)
    counts = {
        f"demand is {_used(p):.2f} nodes at the SLO's limit, and {target:.2f} is the target": load,
        f"{p.replicas} copies of every adapter need the memory": min(copies, MOST_NODES),
        "each replica needs a node": p.replicas,
    }
    reason, count = max(counts.items(), key=lambda item: item[1])
    return WantedNodes(count, f"{count} wanted: {reason}")


def _used(p: Columns) -> float:
    return float(p.alone.sum())


def _by_load(p: Columns, target: float) -> int:
    """Rises with the nodes' padding, so by search."""
    typical = float(np.median(p.speed))
    low = max(1, math.ceil(_used(p) / float(p.load.capacity(np.array([typical]))[0]) / target))
    if low >= MOST_NODES:
        return MOST_NODES
    high = low
    while fill_level(_cluster(p, high, typical)) > target * (1 + 1e-9):
        low, high = high + 1, high * 2
        if high > MOST_NODES:
            return MOST_NODES
    while low < high:
        middle = (low + high) // 2
        if fill_level(_cluster(p, middle, typical)) > target * (1 + 1e-9):
            low = middle + 1
        else:
            high = middle
    return high


def _cluster(p: Columns, count: int, speed: float) -> Columns:
    """The same demand on `count` nodes alike."""
    return replace(
        p,
        memory=np.full(count, np.iinfo(np.int64).max // (count + 1)),
        max_rank=np.zeros(count, np.int64),
        domain=np.arange(count),
        speed=np.full(count, speed),
        node_ids=[""] * count,
        node_base=np.zeros(count, np.int64),
        current=Entries.none(),
        forbidden=np.zeros(0, np.int64),
    )
