"""Every adapter held once, or on every node: four nodes of the demo model and 200 adapters.

    python bench/pool_cluster.py [--nodes N] [--adapters N] [--seconds S] [--rate R] [--out FILE]

The adapters are copies of the demo's ten skills, each with one weight off by its last bit, so each
is a revision of its own whose answers are known. The same requests (the demo's workload, Zipf over
all adapters) go to a cluster with one replica and to one with a replica on every node. Given are
the bytes of adapters that the nodes hold, what they read from where, times to the first token, and
the part of the requests within the SLO. One JSON object with machine, load, commit and command.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from measured_on import measured_on
from prometheus_client.parser import text_string_to_metric_families

from loraserve.checkpoint.packed_adapter import write_packed
from loraserve.checkpoint.peft_adapter import read_peft_directory
from loraserve.client import AsyncClient
from loraserve.demo import adapter_directory
from loraserve.demo.cluster import Cluster
from loraserve.demo.replay import Outcome, Progress, replay
from loraserve.demo.skills import SKILLS
from loraserve.demo.tally import percentile
from loraserve.demo.workload import arrivals, popularity
from loraserve.v1 import controller_pb2, controller_pb2_grpc

TTFT_S, TBT_S = 1.0, 0.15  # of the SLO; a request keeps the second by its own p95
SOURCES = ("loraserve_adapter_read_bytes", "loraserve_peer_reads")


@dataclass(frozen=True)
class Variant:
    name: str
    skill: str
    path: Path


def variants(directory: Path, count: int) -> list[Variant]:
    """Files of `count` revisions, the skills in turn."""
    made = []
    for number in range(count):
        skill = SKILLS[number % len(SKILLS)].name
        source = read_peft_directory(adapter_directory(skill))
        first = source.modules[0]
        b = first.b.copy()
        # The last bits of some weights spell the number.
        bits = b.reshape(-1)[:16].view(np.uint16 if b.itemsize == 2 else np.uint32)
        bits[:16] ^= np.array([number >> i & 1 for i in range(16)], bits.dtype)
        modules = (replace(first, b=b), *source.modules[1:])
        path = directory / f"{skill}-{number}.lora"
        write_packed(replace(source, modules=modules), path)
        made.append(Variant(f"{skill}-{number}", skill, path))
    return made


def kept_slo(outcome: Outcome) -> bool:
    if outcome.error is not None or outcome.ttft_s is None or outcome.ttft_s > TTFT_S:
        return False
    return (percentile(outcome.gaps_s, 0.95) or 0.0) <= TBT_S


async def status_of(cluster: Cluster) -> controller_pb2.GetClusterStatusResponse:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        return await stub.GetClusterStatus(controller_pb2.GetClusterStatusRequest())


def fetched(cluster: Cluster) -> dict[str, float]:
    """What all nodes say of their reads: metric and labels to value."""
    sums: dict[str, float] = defaultdict(float)
    for node in cluster.nodes.values():
        with urllib.request.urlopen(f"http://{node.metrics}/metrics", timeout=10) as page:
            text = page.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(SOURCES) and sample.name.endswith("_total"):
                    labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                    sums[f"{sample.name}{{{labels}}}"] += sample.value
    return dict(sums)


async def run(
    made: Sequence[Variant], nodes: int, replicas: int, seconds: float, rate: float
) -> dict[str, Any]:
    due = arrivals(seconds, rate, seed=1)
    draw = random.Random(1)
    of_skill: dict[str, list[Variant]] = defaultdict(list)
    for variant in made:
        of_skill[variant.skill].append(variant)
    chosen = {
        id(arrival): draw.choices(
            of_skill[arrival.skill.name], popularity(len(of_skill[arrival.skill.name]), 1.0)
        )[0].name
        for arrival in due
    }
    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(
            Path(directory),
            nodes,
            controller_options=["--replicas", str(replicas)],
            node_options=["--threads", "1", "--host-pool-bytes", str(512 << 20)],
        )
        async with cluster, AsyncClient(cluster.address) as client:
            for variant in made:
                await client.adapters.add(variant.name, variant.path)
            await client.wait_routable([v.name for v in made], timeout_s=120)
            progress = Progress(len(due))
            before = os.getloadavg()[0]
            await replay(client, due, progress, lambda arrival: chosen[id(arrival)])
            status = await status_of(cluster)
            outcomes = progress.outcomes
            first = [o.ttft_s for o in outcomes if o.ttft_s is not None]
            return {
                "replicas": replicas,
                "load_average_before_and_after": [before, os.getloadavg()[0]],
                "requests": len(due),
                "errors": sum(o.error is not None for o in outcomes),
                "wrong": sum(o.error is None and not o.correct for o in outcomes),
                "within_slo": round(sum(map(kept_slo, outcomes)) / len(due), 4),
                "ttft_p50_s": percentile(first, 0.5),
                "ttft_p95_s": percentile(first, 0.95),
                "copies": sum(n.copies for n in status.nodes),
                "bytes_held": sum(n.used_bytes for n in status.nodes),
                "fetched": fetched(cluster),
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--rate", type=float, default=60.0, help="requests per second")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        made = variants(Path(directory), given.adapters)
        whole = given.nodes * sum(v.path.stat().st_size for v in made)
        runs = [
            asyncio.run(run(made, given.nodes, replicas, given.seconds, given.rate))
            for replicas in (1, given.nodes)
        ]
    result = {
        **measured_on(),
        "nodes": given.nodes,
        "adapters": given.adapters,
        "slo": {"ttft_s": TTFT_S, "tbt_p95_s": TBT_S},
        "bytes_of_full_replication": whole,
        "runs": runs,
        "part_of_full_replication": round(runs[0]["bytes_held"] / whole, 3),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    # The model itself gets a few words wrong; where the copies lie must not matter.
    return int(any(r["errors"] for r in runs) or runs[0]["wrong"] != runs[1]["wrong"])


if __name__ == "__main__":
    sys.exit(main())
