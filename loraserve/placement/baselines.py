"""Policies that know less, for comparison; the same interface and the same limits.

None looks at the current placement: what they move is what they cost."""

import heapq

import numpy as np
import numpy.typing as npt

from loraserve.placement.bases import by_base
from loraserve.placement.columns import Columns, Entries, Plan
from loraserve.placement.limits import settle

Hashes = npt.NDArray[np.uint64]


def mixed(keys: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, 2014): every bit of the input changes half of the output."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


@by_base
def random(p: Columns) -> Plan:
    """A node for each adapter, drawn by the adapter's id alone."""
    node = (mixed(p.adapter_keys) % np.uint64(p.nodes)).astype(np.int64)
    return settle(p, Entries.of(np.arange(p.adapters), node, np.ones(p.adapters)))


@by_base
def contiguous(p: Columns) -> Plan:
    """Adapters in their order, the same number for each node."""
    row = np.arange(p.adapters)
    return settle(p, Entries.of(row, row * p.nodes // max(1, p.adapters), np.ones(p.adapters)))


@by_base
def hashed(p: Columns) -> Plan:
    """Rendezvous hashing: the nodes with the highest hash of (adapter, node), one for each replica,
    with equal shares. A node that comes or goes moves only its own adapters."""
    copies = min(p.replicas, p.nodes)
    best = np.empty((p.adapters, copies), np.int64)
    for begin in range(0, p.adapters, 1024):
        keys = p.adapter_keys[begin : begin + 1024, None]
        scores = mixed(keys ^ p.node_keys[None, :])
        if copies == 1:
            best[begin : begin + 1024, 0] = scores.argmax(axis=1)
        else:
            best[begin : begin + 1024] = np.argsort(scores, axis=1)[:, ::-1][:, :copies]
    adapter = np.repeat(np.arange(p.adapters), copies)
    return settle(p, Entries.of(adapter, best.ravel(), np.full(len(adapter), 1 / copies)))


@by_base
def load_only(p: Columns) -> Plan:
    """Balances tokens per second whatever their rank: the most wanted first, each to the node with
    the fewest; an adapter with more than a node's part is split evenly."""
    tokens = p.prefill + p.decode
    fair = max(float(tokens.sum()) / p.nodes, 1e-12)
    pieces = np.clip(np.ceil(tokens / fair), 1, p.nodes).astype(np.int64)
    heap = [(0.0, 0, n) for n in range(p.nodes)]
    speed = p.capacity.tolist()
    adapter, node, share = [], [], []
    for a in np.argsort(-tokens, kind="stable").tolist():
        count, taken = int(pieces[a]), []
        for _ in range(count):
            load, held, n = heapq.heappop(heap)
            adapter.append(a)
            node.append(n)
            share.append(1 / count)
            taken.append((load + tokens[a] / count / speed[n], held + 1, n))
        for entry in taken:
            heapq.heappush(heap, entry)
    return settle(p, Entries.of(adapter, node, share))


@by_base
def request_level(p: Columns) -> Plan:
    """Every adapter on every node that has room, by speed: only routing decides. Takes memory for
    adapters x nodes entries."""
    adapter = np.repeat(np.arange(p.adapters), p.nodes)
    node = np.tile(np.arange(p.nodes), p.adapters)
    share = p.capacity[node] / p.capacity.sum()
    # First copies all over the cluster, so that none is left out where memory is short.
    share = share * np.where(node == adapter % p.nodes, 1 + 1e-9, 1.0)
    return settle(p, Entries(adapter, node, share), spread_idle=True)
