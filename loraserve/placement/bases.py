"""Splits a problem by base and takes out what no node could ever hold, so that a policy sees one
base, at least one node, and only adapters that fit somewhere."""

from dataclasses import replace
from functools import wraps

import numpy as np

from loraserve.placement.arrays import Bools, Ints
from loraserve.placement.columns import ColumnPolicy, Columns, Entries, Plan

MOST_PAIRS = 2_000_000  # (adapter, node) pairs looked at in one piece


def by_base(policy: ColumnPolicy) -> ColumnPolicy:
    """`policy` for problems of any bases."""

    @wraps(policy)
    def whole(p: Columns) -> Plan:
        reasons: dict[int, str] = {}
        parts: list[tuple[Ints, Ints, Plan]] = []
        bases = np.unique(p.adapter_base) if len(p.bases) > 1 else np.zeros(min(1, p.adapters), int)
        for base in bases:
            rows = np.flatnonzero(p.adapter_base == base)
            nodes = np.flatnonzero(p.node_base == base)
            if not len(nodes):
                why = f"no node serves the base {p.bases[base]!r}"
                reasons |= dict.fromkeys(rows.tolist(), why)
                continue
            part = part_of(p, rows, nodes)
            fits = _fits_somewhere(part)
            for i in np.flatnonzero(~fits).tolist():
                reasons[int(rows[i])] = _why_nowhere(part, i)
            if not fits.all():
                rows = rows[fits]
                part = part_of(p, rows, nodes)
            if len(rows):
                parts.append((rows, nodes, policy(part)))
        for rows, _, plan in parts:
            reasons |= {int(rows[i]): why for i, why in plan.reasons.items()}
        if len(parts) == 1 and len(parts[0][0]) == p.adapters and len(parts[0][1]) == p.nodes:
            return Plan(parts[0][2].entries, reasons)
        found = [(r[plan.entries.adapter], n[plan.entries.node], plan) for r, n, plan in parts]
        if not found:
            return Plan(Entries.none(), reasons)
        columns = (
            np.concatenate([a for a, _, _ in found]),
            np.concatenate([n for _, n, _ in found]),
            np.concatenate([plan.entries.share for _, _, plan in found]),
        )
        return Plan(Entries.of(*columns), reasons)

    return whole


def part_of(p: Columns, rows: Ints, nodes: Ints) -> Columns:
    """The problem of some adapters and nodes; the same object where that is all of them."""
    if len(rows) == p.adapters and len(nodes) == p.nodes:
        return p
    row = np.full(p.adapters, -1, np.int64)
    row[rows] = np.arange(len(rows))
    place = np.full(p.nodes, -1, np.int64)
    place[nodes] = np.arange(len(nodes))
    now = p.current.where((row[p.current.adapter] >= 0) & (place[p.current.node] >= 0))
    bad_a, bad_n = np.divmod(p.forbidden, max(1, p.nodes))
    inside = (row[bad_a] >= 0) & (place[bad_n] >= 0)
    return replace(
        p,
        size_bytes=p.size_bytes[rows],
        rank=p.rank[rows],
        prefill=p.prefill[rows],
        decode=p.decode[rows],
        adapter_ids=[p.adapter_ids[i] for i in rows],
        adapter_base=p.adapter_base[rows],
        memory=p.memory[nodes],
        max_rank=p.max_rank[nodes],
        domain=p.domain[nodes],
        speed=p.speed[nodes],
        node_ids=[p.node_ids[i] for i in nodes],
        node_base=p.node_base[nodes],
        current=Entries(row[now.adapter], place[now.node], now.share),
        forbidden=np.sort(row[bad_a[inside]] * len(nodes) + place[bad_n[inside]]),
    )


def _fits_somewhere(p: Columns) -> Bools:
    """[adapters]: whether an empty cluster has a node for it."""
    order = np.argsort(-p.rank_limit, kind="stable")
    limits = -p.rank_limit[order]  # rising; nodes of at least a rank's limit are a prefix
    most = np.maximum.accumulate(p.memory[order])
    count = np.searchsorted(limits, -p.rank, side="right")
    fits = (count > 0) & (most[np.maximum(count - 1, 0)] >= p.size_bytes)
    ill, pairs_of = np.unique(p.forbidden // p.nodes, return_counts=True)
    # Most have more nodes that could hold them than forbidden pairs; the others one by one.
    least = np.minimum.accumulate(p.memory[order])
    many = (count[ill] > pairs_of) & (least[np.maximum(count[ill] - 1, 0)] >= p.size_bytes[ill])
    ill = ill[~many]
    for some in np.array_split(ill, 1 + len(ill) * p.nodes // MOST_PAIRS):
        pairs = np.repeat(some, p.nodes), np.tile(np.arange(p.nodes), len(some))
        fits[some] = p.able(*pairs).reshape(len(some), p.nodes).any(axis=1)
    return np.asarray(fits)


def _why_nowhere(p: Columns, a: int) -> str:
    tall = p.rank_limit >= p.rank[a]
    if not tall.any():
        return f"rank {p.rank[a]} is over the limit of every node"
    if not (tall & (p.memory >= p.size_bytes[a])).any():
        return f"no node has {p.size_bytes[a]} bytes of adapter memory"
    return "loading failed on every node"
