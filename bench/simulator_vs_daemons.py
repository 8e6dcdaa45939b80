"""The simulator beside the daemons that it stands for: one trace through both.

    python bench/simulator_vs_daemons.py --profile bench/results/profile_demo.json [--out FILE]

Two loraserve-node processes with the demo model, one engine thread and one core each, and a
controller; every node holds all ten adapters. Requests come by a Poisson process (open loop) at a
part of what a closed loop of many requests gets through. Client and controller share the nodes'
cores, as there may be no others.

What the profile cannot know, because it was measured inside the engine: the time that a served step
takes around the engine (wake-ups, RPC, the client's work on the same cores). Three numbers stand
for it, seconds for each step, for each sequence of a step and for the way to a node and back, and
are fitted on *calibration* windows with other seeds. The windows that are compared are not, and
both kinds come in turn, so that a slow moment of the machine falls on both alike.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from loraserve.client import AsyncClient
from loraserve.controller.state import Settings
from loraserve.demo import MODEL_NAME, adapter_directory
from loraserve.demo.cluster import Cluster as Daemons
from loraserve.demo.skills import SKILLS
from loraserve.errors import LoraServeError
from loraserve.placement.cost_model import Profile
from loraserve.placement.policies import DEFAULT_POLICY, policy_named
from loraserve.profiles.files import load_profile
from loraserve.sampling_params import SamplingParams
from loraserve.sim.capacity import load_model
from loraserve.sim.cluster import Cluster, ClusterSettings
from loraserve.sim.workload import Workload

NODES = 2
PROMPTS, OUTPUTS = (16, 128), (8, 64)
CLOSED_REQUESTS = 48  # at a time, to find the capacity
QUANTILES = (10, 25, 50, 75, 90, 95)


@dataclass(frozen=True)
class Served:
    """Of every request, seconds; `span_s` from the first arrival to the last token."""

    ttft_s: np.ndarray[Any, Any]
    tpot_s: np.ndarray[Any, Any]
    tokens: int
    span_s: float
    failed: int = 0

    @classmethod
    def pooled(cls, windows: Sequence["Served"]) -> "Served":
        return cls(
            np.concatenate([w.ttft_s for w in windows]),
            np.concatenate([w.tpot_s for w in windows]),
            sum(w.tokens for w in windows),
            sum(w.span_s for w in windows),
            sum(w.failed for w in windows),
        )

    def numbers(self) -> dict[str, float]:
        return {
            "requests": len(self.ttft_s),
            "failed": self.failed,
            "ttft_p50_s": float(np.percentile(self.ttft_s, 50)),
            "ttft_p95_s": float(np.percentile(self.ttft_s, 95)),
            "tpot_p50_s": float(np.percentile(self.tpot_s, 50)),
            "tpot_p95_s": float(np.percentile(self.tpot_s, 95)),
            "throughput_tokens_per_s": self.tokens / self.span_s,
        }


def trace(rate: float, seconds: float, seed: int) -> Workload:
    """Zipf over the adapters, lengths uniform."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, int(rate * seconds * 2) + 20))
    times = times[times < seconds]
    shares = 1 / np.arange(1, len(SKILLS) + 1)
    return Workload(
        "poisson",
        tuple(skill.rank for skill in SKILLS),
        times,
        rng.choice(len(SKILLS), len(times), p=shares / shares.sum()),
        rng.integers(PROMPTS[0], PROMPTS[1] + 1, len(times)),
        rng.integers(OUTPUTS[0], OUTPUTS[1] + 1, len(times)),
        seconds,
    )


# The daemons


def pin(pid: int, core: int) -> None:
    """All threads of a process; those to come follow the one that starts them."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {core})


@contextlib.asynccontextmanager
async def cluster(controller_options: list[str]) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        daemons = Daemons(
            Path(directory),
            NODES,
            controller_options=["--replicas", str(NODES), *controller_options],
            node_options=["--threads", "1"],
        )
        async with daemons, AsyncClient(daemons.address) as client:
            cores = sorted(os.sched_getaffinity(0))
            for index, node in enumerate(daemons.nodes.values()):
                pin(node.process.pid, cores[index % len(cores)])
            await client.wait_routable(())
            for skill in SKILLS:
                await client.adapters.add(skill.name, adapter_directory(skill.name))
            names = [skill.name for skill in SKILLS]
            await client.wait_routable(names)
            while any(
                len(route.revisions[0].holders) < NODES for route in client.routes.adapters.values()
            ):
                await asyncio.sleep(0.1)
            yield client


class Requests:
    """Sends requests of a workload and keeps their times."""

    def __init__(self, client: AsyncClient, work: Workload, seed: int) -> None:
        self._client = client
        self._work = work
        rng = np.random.default_rng(seed)
        # Letters, so that prompts differ and no prefix is found.
        self._prompts = [rng.integers(97, 123, n).tolist() for n in work.prompt_tokens]
        self.ttft_s = np.full(len(work), np.nan)
        self.tpot_s = np.full(len(work), np.nan)
        self.tokens = self.failed = 0
        self.begin_s = self.last_s = 0.0

    async def one(self, i: int, due_s: float) -> None:
        output = int(self._work.output_tokens[i])
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        name = SKILLS[int(self._work.adapter[i])].name
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
        for i, at_s in enumerate(self._work.time_s.tolist()):
            await asyncio.sleep(max(0.0, self.begin_s + at_s - time.monotonic()))
            tasks.append(asyncio.create_task(self.one(i, self.begin_s + at_s)))
        await asyncio.gather(*tasks)
        good = ~np.isnan(self.ttft_s)
        span_s = max(self._work.duration_s, self.last_s - self.begin_s)
        return Served(self.ttft_s[good], self.tpot_s[good], self.tokens, span_s, self.failed)

    async def closed_loop(self, at_once: int) -> float:
        """Requests per second."""
        left: Iterator[int] = iter(range(len(self._work)))

        async def worker() -> None:
            for i in left:
                await self.one(i, time.monotonic())

        begin_s = time.monotonic()
        await asyncio.gather(*[worker() for _ in range(at_once)])
        return len(self._work) / (time.monotonic() - begin_s)


# The simulator


def simulated(profile: Profile, work: Workload, network_s: float) -> Served:
    settings = ClusterSettings(
        nodes=NODES,
        clients=1,
        network_s=network_s,
        control=Settings(replicas=NODES),
        warm=False,  # as the daemons: nobody has told the controller what will be asked
    )
    load = load_model(profile, settings.slo, work, NODES)
    run = Cluster(work, profile, policy_named(DEFAULT_POLICY), load, settings)
    run.run()
    done = run.meter.finished
    tokens = sum(s.prompt_tokens + s.output_tokens for s in done)
    return Served(
        np.array([s.first_token_s - s.arrival_s for s in done]),
        np.array([(s.finish_s - s.first_token_s) / (s.output_tokens - 1) for s in done]),
        tokens,
        max(work.duration_s, run.now_s),
        len(work) - len(done),
    )


def simulated_windows(profile: Profile, windows: Sequence[Workload], network_s: float) -> Served:
    return Served.pooled([simulated(profile, work, network_s) for work in windows])


def with_overhead(profile: Profile, step_s: float, sequence_s: float) -> Profile:
    cost = profile.cost
    return replace(
        profile,
        cost=replace(
            cost, step_s=cost.step_s + step_s, decode_token_s=cost.decode_token_s + sequence_s
        ),
    )


def calibrate(
    profile: Profile, windows: Sequence[Workload], served: Served
) -> tuple[float, float, float]:
    """(step, sequence, network) seconds that bring the quantiles of TTFT and of the time for each
    later token closest, in the mean square of their logarithms."""
    wanted = [np.percentile(v, QUANTILES) for v in (served.ttft_s, served.tpot_s)]

    def error(logs: Any) -> float:
        step_s, sequence_s, network_s = np.exp(np.clip(logs, -14, -3))
        found = simulated_windows(with_overhead(profile, step_s, sequence_s), windows, network_s)
        made = [np.percentile(v, QUANTILES) for v in (found.ttft_s, found.tpot_s)]
        return float(np.mean(np.log(np.array(made) / np.array(wanted)) ** 2))

    start = np.log([3e-4, 1e-4, 1e-3])
    simplex = np.vstack([start, *(start + step for step in np.eye(3))])
    options = {"maxfev": 40, "initial_simplex": simplex, "xatol": 0.02, "fatol": 1e-5}
    best = minimize(error, start, method="Nelder-Mead", options=options).x
    step_s, sequence_s, network_s = np.exp(np.clip(best, -14, -3)).tolist()
    return step_s, sequence_s, network_s


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


def commit() -> str:
    result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True)
    return (result.stdout.strip() or "unknown") + ("-dirty" if dirty.stdout.strip() else "")


async def measured(options: argparse.Namespace) -> dict[str, Any]:
    profile = replace(load_profile(options.profile), base=MODEL_NAME)
    seed = options.seed
    async with cluster([]) as client:
        warm = trace(100.0, 2.0, seed + 1)
        await Requests(client, warm, seed + 1).closed_loop(8)
        full = trace(100.0, options.capacity_requests / 100.0, seed + 2)
        capacity = await Requests(client, full, seed + 2).closed_loop(CLOSED_REQUESTS)
        rate = options.load * capacity
        print(f"capacity {capacity:.1f} requests/s, so {rate:.1f}", file=sys.stderr)
        loads = [load_average()]
        kinds: dict[str, list[tuple[Workload, Served]]] = {"calibration": [], "compared": []}
        for number in range(2 * options.windows):
            kind = ("calibration", "compared")[number % 2]
            work = trace(rate, options.seconds, seed + 3 + number)
            served = await Requests(client, work, seed + 3 + number).open_loop()
            kinds[kind].append((work, served))
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
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "load_average_before_and_after_each_window": loads,
        "profile": {"name": profile.name, "source": profile.source, "cost": asdict(profile.cost)},
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
        "simulator_over_daemons": {
            k: ours[k] / real[k] for k in real if k not in ("requests", "failed")
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--profile", required=True, help="of the demo model, taken with one thread on one core")
    add("--windows", type=int, default=4, help="of each kind")
    add("--seconds", type=float, default=15.0, help="of a window")
    add("--capacity-requests", type=int, default=600)
    add("--load", type=float, default=0.6, help="of the capacity")
    add("--seed", type=int, default=1)
    add("--out", type=Path)
    options = parser.parse_args()
    text = json.dumps(asyncio.run(measured(options)), indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
