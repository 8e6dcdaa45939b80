"""Placement at 100,000 adapters on 1,000 nodes: a full plan, and one step after demand drifted.

    python bench/placement_scale.py [--adapters 100000] [--nodes 1000] [--repeats 5] [--out FILE]

Every limit is on: memory (35 % more than the copies need), two replicas in different failure
domains (racks of 20), forbidden pairs, a tenth of the nodes limited to rank 32, a tenth slower.
Demand is Zipf 0.9 over adapters, half of what the nodes sustain; drift multiplies each adapter's by
a log-normal factor of sigma 0.5. The bare kernels are timed beside: the fill without any limit, and
the relief of busy nodes alone. Medians; one JSON object with machine, commit and command.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loraserve.placement.columns import Columns, bytes_moved, peak, utilisation
from loraserve.placement.fill import fill_level, fills
from loraserve.placement.limits import settle
from loraserve.placement.load import DEFAULT_PROFILE, LoadModel
from loraserve.placement.policies import COLUMN_POLICIES
from loraserve.placement.rebalance import Aim, rebalance

RANKS, PARTS = (8, 16, 32, 64, 128), (0.30, 0.25, 0.20, 0.15, 0.10)
RACK = 20


def problem(adapters: int, nodes: int, replicas: int, seed: int, padded: bool) -> Columns:
    random = np.random.default_rng(seed)
    rank = random.choice(RANKS, adapters, p=PARTS).astype(np.int64)
    size = rank * DEFAULT_PROFILE.bytes_per_rank
    wanted = random.permutation(1 / np.arange(1, adapters + 1) ** 0.9)
    cost = DEFAULT_PROFILE.cost
    if padded:
        cost = replace(cost, token_rank_s=0.0, token_max_rank_s=cost.token_rank_s)
    load = LoadModel(replace(DEFAULT_PROFILE, cost=cost, padded=padded))
    tokens = wanted / wanted.sum() * nodes * 0.5 * float(load.points.tokens_per_s[32])
    place = np.arange(nodes)
    pairs = np.unique(random.integers(0, adapters * nodes, adapters // 100))
    return Columns(
        size_bytes=size,
        rank=rank,
        prefill=tokens * 0.8,
        decode=tokens * 0.2,
        memory=np.full(nodes, int(1.35 * replicas * size.sum() / nodes)),
        max_rank=np.where(place % 10 == 0, 32, 0),
        domain=place // RACK,
        speed=np.where(place % 10 == 3, 0.7, 1.0),
        adapter_ids=range(adapters),
        node_ids=[f"n{i}" for i in range(nodes)],
        adapter_base=np.zeros(adapters, np.int64),
        node_base=np.zeros(nodes, np.int64),
        forbidden=pairs,
        replicas=replicas,
        load=load,
    )


def drifted(p: Columns, current: Any, seed: int) -> Columns:
    random = np.random.default_rng(seed)
    factor = random.lognormal(0.0, 0.5, p.adapters)
    factor *= p.alone.sum() / (p.alone * factor).sum()
    return replace(p, prefill=p.prefill * factor, decode=p.decode * factor, current=current)


def milliseconds(run: Callable[[int], Any], repeats: int) -> dict[str, float]:
    """Medians of wall and CPU time; `run` gets the number of the repeat, for a fresh problem each
    time. Wall time over CPU time says that others used the cores."""
    wall, cpu = [], []
    for number in range(repeats):
        begin = time.perf_counter(), time.process_time()
        run(number)
        wall.append(time.perf_counter() - begin[0])
        cpu.append(time.process_time() - begin[1])
    median = {"wall_ms": statistics.median(wall), "cpu_ms": statistics.median(cpu)}
    return {key: round(value * 1e3, 1) for key, value in (median | {"least_ms": min(wall)}).items()}


def measure(arguments: argparse.Namespace, replicas: int, padded: bool) -> dict[str, Any]:
    rank_aware = COLUMN_POLICIES["rank_aware"]
    n = arguments.repeats
    problems = [problem(arguments.adapters, arguments.nodes, replicas, s, padded) for s in range(n)]
    plans = {}

    def plan(i: int) -> None:
        plans[i] = rank_aware(problems[i]).entries

    full = milliseconds(plan, n)
    later = [drifted(problems[i], plans[i], i) for i in range(n)]
    steps = {}

    def step(i: int) -> None:
        steps[i] = rank_aware(later[i]).entries

    incremental = milliseconds(step, n)
    p, q = problems[0], later[0]
    kept = settle(q, q.current).entries
    level = fill_level(q)
    free = [replace(p, memory=p.memory * 100, forbidden=p.forbidden[:0], replicas=1)] * n
    return {
        "replicas": replicas,
        "padded": padded,
        "full": full,
        "step": incremental,
        "full_peak_over_level": round(peak(p, plans[0]) / fill_level(p), 4),
        "step_peak_before_over_level": round(peak(q, q.current) / level, 4),
        "step_peak_over_level": round(peak(q, steps[0]) / level, 4),
        "step_bytes_moved_part": round(bytes_moved(q, steps[0]) / float(q.size_bytes.sum()), 5),
        "max_over_mean_load": round(
            float(utilisation(q, steps[0]).max() / utilisation(q, steps[0]).mean()), 4
        ),
        "kernel_fill": milliseconds(lambda i: fills(replace(free[i])), n),
        "kernel_relief": milliseconds(
            lambda i: rebalance(q, kept, Aim(1.05 * level, 1.02 * level)), n
        ),
        "paper_full": milliseconds(lambda i: COLUMN_POLICIES["paper"](replace(p)), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    made = {
        "adapters": arguments.adapters,
        "nodes": arguments.nodes,
        "cases": [
            measure(arguments, replicas, padded)
            for replicas, padded in ((2, False), (1, False), (1, True))
        ],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_average": os.getloadavg()[0],
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "command": " ".join(sys.argv),
    }
    text = json.dumps(made, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
