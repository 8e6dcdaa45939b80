"""The controller's core, its route watch and the client's table at 100,000 adapters on 1,000 nodes.

    python bench/controller_scale.py [--adapters N] [--nodes N] [--watchers N] [--out FILE]

The core is driven without a network: nodes hold what they were told to. Timed are single events:
heartbeats that say nothing new, that bring demand of 20 adapters, and that tell of one copy that
changed; ticks without and with 10,000 active adapters; a new adapter; a lost node; a whole
placement. Then a real servicer in this process sends a change of one adapter to all watchers, from
the event to the last of them. The client's table is measured by tracemalloc. One JSON object with
machine, commit and command.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from controller_cluster import Cluster, quantiles, specs, timed

from loraserve.checkpoint.durable_store import DurableStore
from loraserve.client.messages import update_from_wire
from loraserve.client.route_table import RouteBook
from loraserve.client.routing import Router, RouteRequest
from loraserve.controller.events import (
    AdapterAdded,
    ComputePlacement,
    Copy,
    DemandSample,
    Event,
    Heartbeat,
    NodeRecord,
    NodeRegistered,
    PlacementComputed,
    Residency,
    Tick,
)
from loraserve.controller.placing import solve
from loraserve.controller.registry import AdapterRegistry
from loraserve.controller.route_log import RouteChanges
from loraserve.controller.route_messages import messages
from loraserve.controller.runtime import Runtime
from loraserve.controller.server import GC_THRESHOLDS, ControllerOptions, ControllerServer
from loraserve.controller.state import ControllerState, Settings
from loraserve.controller.store import AdapterRecord, SqliteStore
from loraserve.placement.policies import DEFAULT_POLICY, policy_named
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.v1 import controller_pb2, controller_pb2_grpc
from loraserve.wire import dial

ACTIVE = 10_000


def core(adapters: list[AdapterSpec], nodes: int, seed: int) -> tuple[dict[str, Any], Cluster]:
    begin = time.perf_counter()
    cluster = Cluster(adapters, nodes)
    start_s = time.perf_counter() - begin
    state, pick = cluster.state, random.Random(seed)
    assert state.unrouted == 0, state.unrouted
    ids = list(cluster.generation)

    def steps(events: Iterable[Event]) -> dict[str, float]:
        return quantiles([timed(lambda e=event: cluster.step(e)) for event in events])  # type: ignore[misc]

    def samples(count: int) -> tuple[DemandSample, ...]:
        return tuple(DemandSample(pick.choice(adapters).adapter, 50, 10) for _ in range(count))

    def one_copy_changed() -> Iterator[Heartbeat]:
        for node_id in (n for n in ids if state.nodes[n].copies):
            (adapter, revision), copy = next(iter(state.nodes[node_id].copies.items()))
            device = copy.state is Residency.DEVICE
            now = Residency.HOST if device else Residency.DEVICE
            cluster.changes[node_id].append(Copy(adapter, revision, now))
            yield cluster.beat(node_id)

    def active_tick() -> Tick:
        for sample in samples(ACTIVE):
            state._planner.count(sample.adapter, 50, 10)
        return Tick()

    out: dict[str, Any] = {
        "start_s": round(start_s, 2),
        "heartbeat_nothing_new": steps(cluster.beat(n) for n in ids),
        "heartbeat_demand_of_20": steps(cluster.beat(n, samples(20)) for n in ids),
        "heartbeat_one_copy_changed": steps(one_copy_changed()),
        "whole_heartbeat": steps(
            Heartbeat(n, 1, cluster.generation[n], tuple(state.nodes[n].copies.values()))
            for n in ids
        ),
    }
    for _ in range(2):
        cluster.step(Tick())
        cluster.beats()
    ticks = []
    for _ in range(12):
        ticks.append(timed(lambda: cluster.step(Tick())))
        cluster.beats()
    out["tick_idle"] = quantiles(ticks)
    ticks = []
    for _ in range(12):
        tick = active_tick()
        ticks.append(timed(lambda t=tick: cluster.step(t)))  # type: ignore[misc]
        cluster.beats()
    out["tick_10000_active"] = quantiles(ticks)
    out["adapter_added"] = steps(
        AdapterAdded(
            AdapterSpec(AdapterId("tenant-new", "base", f"new-{i}"), f"{i:064x}", 16 << 20, 16)
        )
        for i in range(50)
    )
    cluster.beats()
    whole = []
    for _ in range(3):
        state._planner.request(state._tick)
        whole.append(timed(lambda: cluster.step(Tick())))
        cluster.beats()
    out["whole_placement_ms"] = round(1e3 * statistics.median(whole), 1)
    dead = ids[-1]
    routed_before = state.routes.version
    for _ in range(5):
        for node_id in ids[:-1]:
            cluster.step(cluster.beat(node_id))
        spent = timed(lambda: cluster.step(Tick()))
        if dead not in state.nodes:
            break
    out["node_lost_ms"] = round(1e3 * spent, 1)
    assert state.routes.version > routed_before
    return out, cluster


async def placement_in_a_thread(cluster: Cluster, demand_of: list[AdapterSpec]) -> dict[str, float]:
    """As the daemon places: how long the loop is kept from everything else, by asking and adopting,
    and by sharing the interpreter with the thread (a probe that sleeps a millisecond)."""
    state = cluster.state
    cluster.beats()  # else the tick below would find all nodes quiet
    loop, waits = asyncio.get_running_loop(), [0.0]

    async def probe() -> None:
        while True:
            begin = loop.time()
            await asyncio.sleep(0.001)
            waits.append(loop.time() - begin - 0.001)

    for spec in demand_of:
        state._planner.count(spec.adapter, 500, 100)
    state._planner._gather()
    closing = timed(lambda: state._planner._demand.close_window(state._tick + 1.5))
    state._planner.request(state._tick)
    state._defers_placement = True
    begin = time.perf_counter()
    effects = state.step(Tick())
    asked = time.perf_counter() - begin
    (question,) = (e.question for e in effects if isinstance(e, ComputePlacement))
    probing = asyncio.create_task(probe())
    begin = time.perf_counter()
    answer = await asyncio.to_thread(solve, question)
    solved = time.perf_counter() - begin
    probing.cancel()
    adopted = timed(lambda: cluster.step(PlacementComputed(answer)))
    state._defers_placement = False
    cluster.beats()
    ms = {"close_window": closing, "ask": asked, "solve": solved, "adopt": adopted}
    ms["longest_wait_of_others"] = max(waits)
    return {f"{key}_ms": round(1e3 * value, 1) for key, value in ms.items()}


def pick_us(cluster: Cluster, count: int) -> dict[str, float]:
    """A client's choice of a node for adapters with few holders; and of the CPU time of one where
    the route is unpacked for the first time."""
    book = RouteBook()
    for wire in messages(RouteChanges(cluster.state.routes, None), lambda _: True, "", True):
        book.take(update_from_wire(wire))
    router = Router(time.monotonic, random.Random(1).random, book.table)
    asked = [RouteRequest(a.base, a.name) for a in islice(book.table.adapters, count)]
    begin = time.process_time()
    for request in asked:
        assert router.pick(request) is not None
    cold = time.process_time() - begin
    begin = time.process_time()
    for _ in range(10):
        for request in asked[:200]:
            router.pick(request)
    warm = time.process_time() - begin
    return {"cold_us": round(1e6 * cold / count, 1), "warm_us": round(1e6 * warm / 2000, 1)}


def restart(cluster: Cluster) -> dict[str, float]:
    """A controller that comes back: store, registry and core, then all nodes report. As in the
    daemon, garbage is looked for once in what was made at the start, and not again."""
    state = cluster.state
    reports = {n: tuple(node.copies.values()) for n, node in state.nodes.items()}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "controller.sqlite"
        fill(SqliteStore(path), state)
        gc.collect()
        gc.freeze()
        before = gc.get_threshold()
        gc.set_threshold(*GC_THRESHOLDS)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        store = SqliteStore(path)
        records = store.adapters()
        read_cpu = time.process_time() - begin_cpu
        policy = policy_named(DEFAULT_POLICY)
        runtime = Runtime.start(store, records, cluster.settings, policy)
        AdapterRegistry(runtime, records, DurableStore(directory), lambda: 0)
        gc.collect()
        gc.freeze()
        made_cpu = time.process_time() - begin_cpu
        for node_id, copies in reports.items():
            runtime.state.step(NodeRegistered(state.nodes[node_id].record))
            runtime.state.step(Heartbeat(node_id, 1, 1, copies))
        gc.unfreeze()
        gc.set_threshold(*before)
        spent = {
            "cpu_s": time.process_time() - begin_cpu,
            "adapters_read_cpu_s": read_cpu,
            "made_cpu_s": made_cpu,
            "all_routed_s": time.perf_counter() - begin,
        }
        store.close()
    return {k: round(v, 2) for k, v in spent.items()} | {"unrouted": runtime.state.unrouted}


def fill(store: SqliteStore, state: ControllerState) -> None:
    store._connection.execute("PRAGMA synchronous = OFF")
    for adapter in state.routes.adapters:
        store.put_adapter(AdapterRecord(state.history(adapter), 1, 1))
    store.save_placement({a: dict(t.parts) for a, t in state._targets.all.items()})
    store.close()


def client_table(cluster: Cluster) -> dict[str, float]:
    """The table as a client of all tenants gets it."""

    def parts() -> Iterator[controller_pb2.WatchRoutesResponse]:
        return messages(RouteChanges(cluster.state.routes, None), lambda _: True, "", True)

    wire = [m.SerializeToString() for m in parts()]
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    book = RouteBook()
    for data in wire:
        book.take(update_from_wire(controller_pb2.WatchRoutesResponse.FromString(data)))
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    names = [a.name for a in islice(book.table.adapters, 2000)]
    begin = time.perf_counter()
    for name in names:
        assert book.table.find("", name) is not None
    find_s = (time.perf_counter() - begin) / len(names)
    begin = time.perf_counter()
    again = RouteBook()
    for data in wire:
        again.take(update_from_wire(controller_pb2.WatchRoutesResponse.FromString(data)))
    return {
        "adapters": len(book.table.adapters),
        "memory_mb": round(held / 1e6, 2),
        "wire_mb": round(sum(map(len, wire)) / 1e6, 2),
        "read_s": round(time.perf_counter() - begin, 2),
        "find_us": round(1e6 * find_s, 1),
    }


async def watchers(adapters: list[AdapterSpec], count: int) -> dict[str, Any]:
    """From an event of the core to the last of the watchers, over the wire in this process. The
    watchers are of the role that sees all tenants; most of the time is theirs."""
    with tempfile.TemporaryDirectory() as directory:
        still = Settings(tick_seconds=3600.0)  # nothing but what is timed changes
        options = ControllerOptions("127.0.0.1:0", Path(directory), settings=still)
        server = ControllerServer(options)
        await server.start()
        state = server.runtime.state
        for spec in adapters[:5000]:
            state._catalog.add(spec)
        state._dirty |= set(state._catalog)
        await server.runtime.apply(NodeRegistered(NodeRecord("n", 1, "n:1", "base", "", 1 << 60)))
        await asyncio.gather(*server.runtime._placing)
        heard: asyncio.Queue[int] = asyncio.Queue()

        async def watch() -> None:
            async with dial(server.address) as channel:
                stub: Any = controller_pb2_grpc.ControllerServiceStub(channel)
                async for message in stub.WatchRoutes(controller_pb2.WatchRoutesRequest()):
                    if not message.more:
                        heard.put_nowait(message.version)

        tasks = [asyncio.create_task(watch()) for _ in range(count)]
        version = state.routes.version
        for _ in range(count):
            assert await heard.get() == version
        times = []
        for i in range(30):
            spec = AdapterSpec(AdapterId("t", "base", f"more-{i}"), f"{i:064x}", 1, 8)
            begin = time.perf_counter()
            await server.runtime.apply(AdapterAdded(spec))
            version = state.routes.version
            left = count
            while left:
                left -= await heard.get() == version
            times.append(time.perf_counter() - begin)
            await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop(0.1)
        return {"watchers": count, "last_heard": quantiles(times)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--watchers", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    adapters = specs(arguments.adapters, arguments.seed)
    measured, cluster = core(adapters, arguments.nodes, arguments.seed)
    result = {
        "command": " ".join(["python", "bench/controller_scale.py", *sys.argv[1:]]),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": {
            "cpus": os.cpu_count(),
            "system": platform.system(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        "adapters": arguments.adapters,
        "nodes": arguments.nodes,
        "core": measured,
        "load_average": os.getloadavg()[0],
        "whole_placement_in_a_thread": {
            f"{count}_active": asyncio.run(placement_in_a_thread(cluster, adapters[:count]))
            for count in (ACTIVE, len(adapters))
        },
        "restart": restart(cluster),
        "client_pick": pick_us(cluster, 2000),
        "client_table": client_table(cluster),
    }
    del cluster
    result["route_watch"] = asyncio.run(watchers(adapters, arguments.watchers))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
