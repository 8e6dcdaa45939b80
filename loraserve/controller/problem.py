"""The cluster as placement sees it: the core's state as columns, and a plan back as targets."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain

import numpy as np

from loraserve.controller.catalog import Rows
from loraserve.controller.targets import Target, target
from loraserve.placement.columns import Columns, Entries, Plan
from loraserve.placement.convert import check_columns, domains_of
from loraserve.placement.load import LoadModel
from loraserve.placement.types import AdapterId, AdapterSpec, Demand, NodeCapacity

# Shares are told apart by the hundredth: finer ones would only change routes for nothing.
SHARE_STEPS = 100


@dataclass(frozen=True)
class ProblemLimits:
    forbidden: frozenset[tuple[AdapterId, str]]
    replicas: int
    byte_budget: int | None
    load: LoadModel


def columns_of_cluster(
    rows: Rows,
    nodes: Sequence[NodeCapacity],
    demand: Mapping[AdapterId, Demand],
    current: Mapping[AdapterId, Target],
    limits: ProblemLimits,
    idle: Mapping[int, Demand] | None = None,
) -> Columns:
    """In the order of `rows` and `nodes`. `idle`: by rank, the demand of each adapter that `demand`
    does not name. Raises InvalidArgumentError as check_columns."""
    row = rows.row
    place = {node.node_id: i for i, node in enumerate(nodes)}
    bases = [*rows.bases, *sorted({n.base for n in nodes} - set(rows.bases))]
    base_row = {base: i for i, base in enumerate(bases)}
    rates = np.zeros((2, len(row)))
    for adapter, rate in demand.items():
        if adapter in row:
            rates[:, row[adapter]] = rate.prefill, rate.decode
    silent = rates.sum(axis=0) == 0
    for rank, rate in (idle or {}).items():
        rates[:, silent & (rows.rank == rank)] = [[rate.prefill], [rate.decode]]
    bad = [row[a] * len(nodes) + place[n] for a, n in limits.forbidden if a in row and n in place]
    made = Columns(
        size_bytes=rows.size_bytes,
        rank=rows.rank,
        prefill=rates[0],
        decode=rates[1],
        memory=np.array([n.adapter_memory_bytes for n in nodes], np.int64),
        max_rank=np.array([n.max_rank for n in nodes], np.int64),
        domain=domains_of(nodes),
        speed=np.array([n.speed for n in nodes], np.float64),
        adapter_ids=rows.adapters,
        node_ids=[n.node_id for n in nodes],
        adapter_base=rows.base,
        node_base=np.array([base_row[n.base] for n in nodes], np.int64),
        bases=bases,
        current=_entries(row, place, current),
        forbidden=np.unique(np.array(bad, np.int64)),
        replicas=limits.replicas,
        byte_budget=limits.byte_budget,
        load=limits.load,
    )
    check_columns(made)
    return made


def _entries(
    row: Mapping[AdapterId, int], place: Mapping[str, int], current: Mapping[AdapterId, Target]
) -> Entries:
    """Of adapters and nodes that are there. Column by column, as there may be 200,000."""
    targets = current.values()
    counts = np.fromiter((len(t.nodes) for t in targets), np.int64, len(current))
    total = int(counts.sum())
    rows = np.fromiter((row.get(a, -1) for a in current), np.int64, len(current))
    nodes = chain.from_iterable(t.nodes for t in targets)
    node = np.fromiter((place.get(n, -1) for n in nodes), np.int64, total)
    share = np.fromiter(chain.from_iterable(t.shares for t in targets), np.float64, total)
    adapter = np.repeat(rows, counts)
    there = (adapter >= 0) & (node >= 0)
    return Entries.of(adapter[there], node[there], share[there])


def changed_targets(
    p: Columns, plan: Plan, rows: Rows, displaced: Set[AdapterId] = frozenset()
) -> Iterator[tuple[AdapterSpec, Target]]:
    """Adapters that the plan wants elsewhere, or with other shares, than `p.current` has them, and
    the `displaced`."""
    different = _digests(p, plan.entries) != _digests(p, p.current)
    different[[rows.row[a] for a in displaced if a in rows.row]] = True
    entries = plan.entries.where(different[plan.entries.adapter])
    found: dict[int, list[tuple[str, float]]] = {r: [] for r in np.flatnonzero(different).tolist()}
    for row, node, share in zip(
        entries.adapter.tolist(), entries.node.tolist(), entries.share.tolist(), strict=True
    ):
        found[row].append((p.node_ids[node], share))
    for row, held in found.items():
        yield rows.specs[row], target(tuple(n for n, _ in held), tuple(s for _, s in held))


def _digests(p: Columns, entries: Entries) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """[adapters]: a number that tells sets of (node, share) apart."""
    share = np.round(entries.share * SHARE_STEPS).astype(np.uint64)
    mixed = (entries.node.astype(np.uint64) * np.uint64(SHARE_STEPS + 1) + share + np.uint64(1)) * (
        np.uint64(0x9E3779B97F4A7C15)
    )
    mixed ^= mixed >> np.uint64(31)
    sums = np.zeros(p.adapters, np.uint64)
    np.add.at(sums, entries.adapter, mixed)
    return sums
