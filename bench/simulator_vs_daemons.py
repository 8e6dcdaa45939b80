"""The simulator beside the daemons that it stands for: one trace through both.

    python bench/simulator_vs_daemons.py --profile bench/results/profile_demo.json [--out FILE]
    python bench/engine_vs_transformers.py --make-only DIR
    python bench/simulator_vs_daemons.py --profile bench/results/profile_random_120m.json \\
        --model DIR/base --adapters DIR/a? --prompts 32 256 --outputs 16 64 --at-once 16 \\
        --warm-requests 64 --capacity-requests 160 --seconds 20

Two loraserve-node processes, one engine thread and one core each, and a controller; every node
holds all adapters. Requests come by a Poisson process (open loop) at a part of what a closed loop
of many requests gets through. Client and controller share the nodes' cores, as there may be no
others. Both controllers have the same profile, and both have placed for the demand when the first
window begins: the daemons' in a time of requests that are not counted, the simulated one by the
window's history.

What the profile cannot know, because it was measured inside the engine: the time that a served step
takes around the engine (wake-ups, RPC, the client's work on the same cores). Three numbers stand
for it, seconds for each step, for each sequence of a step and for the way to a node and back, and
are fitted on *calibration* windows with other seeds. The windows that are compared are not, and
both kinds come in turn, so that a slow moment of the machine falls on both alike. The simulator
runs every window with several draws of its routers' choices between nodes.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from calibrated_simulator import (
    NODES,
    PLACEMENT_INTERVAL_S,
    ROUTINGS,
    SETTLE_S,
    Served,
    calibrate,
    simulated_windows,
    with_overhead,
)
from measured_on import commit

from loraserve.client import AsyncClient
from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME, adapter_directory
from loraserve.demo.cluster import Cluster as Daemons
from loraserve.demo.skills import SKILLS
from loraserve.errors import LoraServeError
from loraserve.node.model import cpu_name
from loraserve.profiles.files import load_profile
from loraserve.sampling_params import SamplingParams
from loraserve.sim.cluster import ClusterSettings
from loraserve.sim.workload import Workload


@dataclass(frozen=True)
class Adapter:
    name: str
    path: Path
    rank: int


@dataclass(frozen=True)
class Subject:
    """What is served, and the least and most tokens of prompts and answers."""

    model: Path
    base: str
    adapters: tuple[Adapter, ...]
    prompts: tuple[int, int]
    outputs: tuple[int, int]

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Subject":
        lengths = tuple(options.prompts), tuple(options.outputs)
        if options.model is None:
            skills = [Adapter(s.name, adapter_directory(s.name), s.rank) for s in SKILLS]
            return cls(MODEL_DIRECTORY, MODEL_NAME, tuple(skills), *lengths)
        adapters = []
        for path in options.adapters:
            rank = json.loads((path / "adapter_config.json").read_text())["r"]
            adapters.append(Adapter(path.name, path, rank))
        return cls(options.model, options.model.resolve().name, tuple(adapters), *lengths)

    def trace(self, rate: float, seconds: float, seed: int) -> Workload:
        """Zipf over the adapters, lengths uniform; the history is drawn in the same way."""
        history = self._drawn(rate, SETTLE_S, seed + 1000, None)
        return self._drawn(rate, seconds, seed, history)

    def _drawn(self, rate: float, seconds: float, seed: int, history: Workload | None) -> Workload:
        rng = np.random.default_rng(seed)
        times = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 2) + 20))
        times = times[times < seconds]
        count = len(self.adapters)
        shares = 1 / np.arange(1, count + 1)
        return Workload(
            "poisson",
            tuple(adapter.rank for adapter in self.adapters),
            times,
            rng.choice(count, len(times), p=shares / shares.sum()),
            rng.integers(self.prompts[0], self.prompts[1] + 1, len(times)),
            rng.integers(self.outputs[0], self.outputs[1] + 1, len(times)),
            seconds,
            history,
        )

    def mix(self) -> tuple[float, float, int]:
        """Mean tokens of a prompt and an answer, adapters of a node: the controller's options."""
        each = max(1, round(len(self.adapters) / NODES))
        return sum(self.prompts) / 2, sum(self.outputs) / 2, each


# The daemons


def pin(pid: int, core: int) -> None:
    """All threads of a process; those to come follow the one that starts them."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {core})


@contextlib.asynccontextmanager
async def cluster(subject: Subject, profile: str) -> Any:
    prompt, output, adapters = subject.mix()
    control = {
        "--replicas": NODES,
        "--profile": profile,
        "--profile-base": subject.base,
        "--prompt": prompt,
        "--output": output,
        "--node-adapters": adapters,
        "--placement-interval": PLACEMENT_INTERVAL_S,
    }
    with tempfile.TemporaryDirectory() as directory:
        daemons = Daemons(
            Path(directory),
            NODES,
            model=subject.model,
            base=subject.base,
            controller_options=[str(word) for pair in control.items() for word in pair],
            # Every adapter on both nodes, as the simulator has them.
            node_options=["--threads", "1", "--host-pool-bytes", str(1 << 30)],
        )
        async with daemons, AsyncClient(daemons.address) as client:
            cores = sorted(os.sched_getaffinity(0))
            for index, node in enumerate(daemons.nodes.values()):
                pin(node.process.pid, cores[index % len(cores)])
            await client.wait_routable(())
            for adapter in subject.adapters:
                # Random adapters name the folder that their base was made in.
                await client.adapters.add(adapter.name, adapter.path, allow_base_mismatch=True)
            names = [adapter.name for adapter in subject.adapters]
            await client.wait_routable(names, timeout_s=120)
            while any(
                len(route.revisions[0].holders) < NODES for route in client.routes.adapters.values()
            ):
                await asyncio.sleep(0.1)
            yield client


class Requests:
    """Sends requests of a workload and keeps their times."""

    def __init__(
        self, client: AsyncClient, adapters: Sequence[Adapter], work: Workload, seed: int
    ) -> None:
        self._client = client
        self._names = [adapter.name for adapter in adapters]
        self.work = work
        rng = np.random.default_rng(seed)
        # Ids of letters in the demo model; drawn, so that no prefix is found.
        self._prompts = [rng.integers(97, 123, n).tolist() for n in work.prompt_tokens]
        self.ttft_s = np.full(len(work), np.nan)
        self.tpot_s = np.full(len(work), np.nan)
        self.tokens = self.failed = 0
        self.begin_s = self.last_s = 0.0

    async def one(self, i: int, due_s: float) -> None:
        output = int(self.work.output_tokens[i])
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        name = self._names[int(self.work.adapter[i])]
        first_s = None
        try:
            stream = self._client.stream(self._prompts[i], params, adapter=name, timeout_s=60)
            async with contextlib.aclosing(stream):
                async for chunk in stream:
                    if chunk.token_ids and first_s is None:
                        first_s = time.monotonic()
        except LoraServeError:
            self.failed += 1
            return
        assert first_s is not None
        self.last_s = time.monotonic()
        self.ttft_s[i] = first_s - due_s
        self.tpot_s[i] = (self.last_s - first_s) / (output - 1)
        self.tokens += output + len(self._prompts[i])

    async def open_loop(self) -> Served:
        self.begin_s = time.monotonic()
        tasks = []
        for i, at_s in enumerate(self.work.time_s.tolist()):
            await asyncio.sleep(max(0.0, self.begin_s + at_s - time.monotonic()))
            tasks.append(asyncio.create_task(self.one(i, self.begin_s + at_s)))
        await asyncio.gather(*tasks)
        good = ~np.isnan(self.ttft_s)
        span_s = max(self.work.duration_s, self.last_s - self.begin_s)
        return Served(self.ttft_s[good], self.tpot_s[good], self.tokens, span_s, self.failed)

    async def closed_loop(self, at_once: int) -> float:
        """Requests per second."""
        left: Iterator[int] = iter(range(len(self.work)))

        async def worker() -> None:
            for i in left:
                await self.one(i, time.monotonic())

        begin_s = time.monotonic()
        await asyncio.gather(*[worker() for _ in range(at_once)])
        return len(self.work) / (time.monotonic() - begin_s)


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


async def measured(options: argparse.Namespace) -> dict[str, Any]:
    subject = Subject.of(options)
    profile = replace(load_profile(options.profile), base=subject.base)
    seed = options.seed

    def window(client: AsyncClient, rate: float, seconds: float, part: int) -> Requests:
        work = subject.trace(rate, seconds, seed + part)
        return Requests(client, subject.adapters, work, seed + part)

    async with cluster(subject, options.profile) as client:
        await window(client, 100.0, options.warm_requests / 100.0, 1).closed_loop(8)
        full = window(client, 100.0, options.capacity_requests / 100.0, 2)
        capacity = await full.closed_loop(options.at_once)
        rate = options.load * capacity
        print(f"capacity {capacity:.1f} requests/s, so {rate:.1f}", file=sys.stderr)
        await window(client, rate, SETTLE_S, 2 + 2 * options.windows + 1).open_loop()
        loads = [load_average()]
        kinds: dict[str, list[tuple[Workload, Served]]] = {"calibration": [], "compared": []}
        for number in range(2 * options.windows):
            kind = ("calibration", "compared")[number % 2]
            requests = window(client, rate, options.seconds, 3 + number)
            kinds[kind].append((requests.work, await requests.open_loop()))
            loads.append(load_average())
    fitted_on, compared = ([w for w, _ in kinds[k]] for k in kinds)
    calibration, served = (Served.pooled([s for _, s in kinds[k]]) for k in kinds)
    step_s, sequence_s, network_s = calibrate(profile, fitted_on, calibration)
    fitted = with_overhead(profile, step_s, sequence_s)
    ours = simulated_windows(fitted, compared, network_s).numbers()
    bare = simulated_windows(profile, compared, ClusterSettings().network_s).numbers()
    real = served.numbers()
    return {
        "command": " ".join(["python", "bench/simulator_vs_daemons.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": {"platform": platform.platform(), "cpu": cpu_name(), "cores": os.cpu_count()},
        "load_average_before_and_after_each_window": loads,
        "profile": {"name": profile.name, "source": profile.source, "cost": asdict(profile.cost)},
        "adapter_ranks": [adapter.rank for adapter in subject.adapters],
        "tokens_of_prompts_and_answers": [subject.prompts, subject.outputs],
        "simulated_routings_of_a_window": ROUTINGS,
        "fitted_on_the_calibration_windows": {
            "step_s": step_s,
            "sequence_s": sequence_s,
            "network_s": network_s,
            "calibration": calibration.numbers(),
            "simulated": simulated_windows(fitted, fitted_on, network_s).numbers(),
        },
        "capacity_requests_per_s": capacity,
        "rate_requests_per_s": rate,
        "daemons": real,
        "simulator": ours,
        "simulator_without_the_fitted_overhead": bare,
        "simulator_over_daemons": ratios(ours, real),
        "simulator_over_daemons_by_window": [
            ratios(simulated_windows(fitted, [work], network_s).numbers(), one.numbers())
            for work, one in kinds["compared"]
        ],
    }


def ratios(ours: dict[str, float], real: dict[str, float]) -> dict[str, float]:
    return {k: ours[k] / real[k] for k in real if k not in ("requests", "failed")}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--profile", required=True, help="of the model, taken with one thread on one core")
    add("--model", type=Path, help="Hugging Face directory; without one the demo's")
    add("--adapters", type=Path, nargs="+", default=[], help="PEFT directories, most asked first")
    add("--prompts", type=int, nargs=2, default=(16, 128), help="least and most tokens")
    add("--outputs", type=int, nargs=2, default=(8, 64), help="least and most tokens")
    add("--windows", type=int, default=4, help="of each kind")
    add("--seconds", type=float, default=15.0, help="of a window")
    add("--warm-requests", type=int, default=200)
    add("--capacity-requests", type=int, default=600)
    add("--at-once", type=int, default=48, help="requests, to find the capacity")
    add("--load", type=float, default=0.6, help="of the capacity")
    add("--seed", type=int, default=1)
    add("--out", type=Path)
    options = parser.parse_args()
    if (options.model is None) != (not options.adapters):
        parser.error("--model and --adapters go together")
    text = json.dumps(asyncio.run(measured(options)), indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
