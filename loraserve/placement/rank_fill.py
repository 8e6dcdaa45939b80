"""Rank-sorted fill: adapters by falling rank fill one node's share after the other, so that
neighbours in rank share a node. What is placed stays, unless its node is far over its share.
"""

from collections import Counter
from collections.abc import Iterable

from loraserve.placement.types import (
    AdapterId,
    AdapterSpec,
    Demand,
    NodeCapacity,
    Placement,
    PlacementProblem,
)

# Stand-in for the cost model: a token of rank r costs 1 + r / RANK_OF_BASE_COST.
RANK_OF_BASE_COST = 128
MAX_RANK = 512
# Known but idle adapters count as this many tokens per second.
IDLE_TOKENS_PER_S = 1.0
# A share may be overdrawn by this factor before adapters move away, and by less when filling:
# the gap keeps a placement from moving to and fro.
MOVE_ABOVE = 1.25
FILL_UP_TO = 1.05


class _Bin:
    """One node while it is being filled."""

    def __init__(self, node: NodeCapacity) -> None:
        self.node = node
        self.load = 0.0
        self.free_bytes = node.adapter_memory_bytes
        self.held: dict[AdapterId, tuple[AdapterSpec, float]] = {}
        self._ranks: Counter[int] = Counter()

    def add(self, spec: AdapterSpec, load: float) -> None:
        self.held[spec.adapter] = (spec, load)
        self._ranks[spec.max_rank] += 1
        self.load += load
        self.free_bytes -= spec.size_bytes

    def remove(self, adapter: AdapterId) -> None:
        spec, load = self.held.pop(adapter)
        self._ranks[spec.max_rank] -= 1
        self.load -= load
        self.free_bytes += spec.size_bytes

    def rank_distance(self, rank: int) -> int:
        """How far the nearest rank on the node is; an empty node is begun last."""
        ranks = (abs(held - rank) for held, count in self._ranks.items() if count)
        return min(ranks, default=MAX_RANK)


def _load(spec: AdapterSpec, demand: Demand | None, copies: int) -> float:
    tokens = IDLE_TOKENS_PER_S + (demand.prefill + demand.decode if demand else 0.0)
    return tokens * (1 + spec.max_rank / RANK_OF_BASE_COST) / copies


def _may_hold(node: NodeCapacity, spec: AdapterSpec, problem: PlacementProblem) -> bool:
    return (
        node.base == spec.adapter.base
        and not (node.max_rank and spec.max_rank > node.max_rank)
        and (spec.adapter, node.node_id) not in problem.forbidden
    )


def _why_nowhere(spec: AdapterSpec, problem: PlacementProblem) -> str:
    nodes = [n for n in problem.nodes if n.base == spec.adapter.base]
    if not nodes:
        return f"no node serves the base {spec.adapter.base!r}"
    nodes = [n for n in nodes if not (n.max_rank and spec.max_rank > n.max_rank)]
    if not nodes:
        return f"rank {spec.max_rank} is over the limit of every node"
    nodes = [n for n in nodes if (spec.adapter, n.node_id) not in problem.forbidden]
    if not nodes:
        return "loading failed on every node"
    return f"no node has {spec.size_bytes} bytes of adapter memory left"


def _relieve(bins: Iterable[_Bin], share: float) -> None:
    """Brings nodes that are far over their share down to it, with few and large moves."""
    for crowded in [b for b in bins if b.load > MOVE_ABOVE * share]:
        largest_first = sorted(
            ((load, spec.adapter) for spec, load in crowded.held.values()), reverse=True
        )
        for load, adapter in largest_first:
            if load <= crowded.load - share:
                crowded.remove(adapter)


def rank_fill(problem: PlacementProblem) -> Placement:
    """Balances the summed load (tokens/s, weighted by rank) within the nodes' memory."""
    bins = {n.node_id: _Bin(n) for n in sorted(problem.nodes, key=lambda n: n.node_id)}
    specs = sorted(problem.adapters, key=lambda s: (-s.max_rank, s.adapter))
    able = {s.adapter: [b for b in bins.values() if _may_hold(b.node, s, problem)] for s in specs}
    copies = {s.adapter: max(1, min(problem.replicas, len(able[s.adapter]))) for s in specs}
    loads = {s.adapter: _load(s, problem.demand.get(s.adapter), copies[s.adapter]) for s in specs}
    share = sum(loads[s.adapter] * copies[s.adapter] for s in specs) / max(1, len(bins))

    for spec in specs:
        kept = problem.current.get(spec.adapter, ())
        for bin_ in [b for b in able[spec.adapter] if b.node.node_id in kept]:
            if spec.size_bytes <= bin_.free_bytes and copies[spec.adapter] > sum(
                spec.adapter in b.held for b in bins.values()
            ):
                bin_.add(spec, loads[spec.adapter])
    _relieve(bins.values(), share)

    unplaced: dict[AdapterId, str] = {}
    holders: dict[AdapterId, tuple[str, ...]] = {}
    for spec in specs:
        load = loads[spec.adapter]
        chosen = [b for b in able[spec.adapter] if spec.adapter in b.held]
        while len(chosen) < copies[spec.adapter]:
            room = [
                b for b in able[spec.adapter] if b not in chosen and spec.size_bytes <= b.free_bytes
            ]
            if not room:
                break
            # Nearest in rank among nodes below their share; where none is, the least loaded.
            best = min(
                room,
                key=lambda b: (
                    (0, b.rank_distance(spec.max_rank), -b.load)
                    if b.load + load <= FILL_UP_TO * share
                    else (1, b.load, 0.0)
                ),
            )
            best.add(spec, load)
            chosen.append(best)
        if chosen:
            holders[spec.adapter] = tuple(sorted(b.node.node_id for b in chosen))
        else:
            unplaced[spec.adapter] = _why_nowhere(spec, problem)
    return Placement(holders, unplaced)
