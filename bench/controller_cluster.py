"""A cluster for benchmarks: the controller's core without a network; its nodes obey at once."""

import hashlib
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from loraserve.controller.events import (
    Copy,
    DemandSample,
    Effect,
    Event,
    Heartbeat,
    NodeRecord,
    NodeRegistered,
    Residency,
    SendDrop,
    SendLoad,
    Tick,
)
from loraserve.controller.state import ControllerState, Settings
from loraserve.placement.policies import DEFAULT_POLICY, policy_named
from loraserve.placement.types import AdapterId, AdapterSpec

RANKS, PARTS = (8, 16, 32, 64, 128), (0.30, 0.25, 0.20, 0.15, 0.10)
BYTES_PER_RANK = 5_242_880


def specs(count: int, seed: int) -> list[AdapterSpec]:
    ranks = random.Random(seed).choices(RANKS, PARTS, k=count)
    return [
        AdapterSpec(
            AdapterId(f"tenant-{i % 500:03d}", "base", f"customer-adapter-{i:06d}"),
            hashlib.sha256(str(i).encode()).hexdigest(),
            rank * BYTES_PER_RANK,
            rank,
        )
        for i, rank in enumerate(ranks)
    ]


class Cluster:
    """The core and nodes that do at once what they are told to."""

    def __init__(self, adapters: list[AdapterSpec], nodes: int) -> None:
        self.settings = Settings(placement_interval_ticks=1_000_000, move_bytes=1 << 40)
        policy = policy_named(DEFAULT_POLICY)
        self.state = ControllerState(self.settings, policy, 1, [(s,) for s in adapters])
        memory = int(1.6 * sum(s.size_bytes for s in adapters) / nodes)
        self.memory = memory
        self.generation = dict.fromkeys((f"node-{i:04d}" for i in range(nodes)), 1)
        self.changes: dict[str, list[Copy]] = {n: [] for n in self.generation}
        self.gone: dict[str, list[tuple[AdapterId, str]]] = {n: [] for n in self.generation}
        for node_id in self.generation:
            self.register(node_id)
        for _ in range(8):
            self.beats()
            self.step(Tick())

    def register(self, node_id: str) -> None:
        address = f"{node_id}:7410"
        self.step(NodeRegistered(NodeRecord(node_id, 1, address, "base", "", self.memory)))
        self.step(Heartbeat(node_id, 1, 1))

    def step(self, event: Event) -> list[Effect]:
        effects = self.state.step(event)
        for effect in effects:
            if isinstance(effect, SendLoad):
                spec = effect.spec
                copy = Copy(spec.adapter, spec.revision, Residency.HOST)
                self.changes[effect.node_id].append(copy)
            elif isinstance(effect, SendDrop):
                self.gone[effect.node_id].append((effect.adapter, effect.revision))
        return effects

    def beat(self, node_id: str, demand: tuple[DemandSample, ...] = ()) -> Heartbeat:
        """What changed since the node's heartbeat before."""
        copies, self.changes[node_id] = tuple(self.changes[node_id]), []
        gone, self.gone[node_id] = tuple(self.gone[node_id]), []
        since = self.generation[node_id]
        if copies or gone:
            self.generation[node_id] += 1
        now = self.generation[node_id]
        return Heartbeat(node_id, 1, now, copies, demand, since_generation=since, removed=gone)

    def beats(self) -> None:
        for node_id in self.generation:
            self.step(self.beat(node_id))


def timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def quantiles(times_s: Iterable[float]) -> dict[str, float]:
    ordered = sorted(times_s)
    return {
        "median_ms": round(1e3 * statistics.median(ordered), 4),
        "p99_ms": round(1e3 * ordered[int(0.99 * (len(ordered) - 1))], 4),
    }
