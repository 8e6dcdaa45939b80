"""The simulator as two daemons: what a profile cannot know is fitted to what they served."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize

from loraserve.controller.state import Settings
from loraserve.placement.cost_model import Profile
from loraserve.placement.policies import DEFAULT_POLICY, policy_named
from loraserve.sim.capacity import load_model
from loraserve.sim.cluster import Cluster, ClusterSettings
from loraserve.sim.workload import Workload

NODES = 2
PLACEMENT_INTERVAL_S = 30
SETTLE_S = 2.5 * PLACEMENT_INTERVAL_S  # requests that only tell the controller what is asked for
ROUTINGS = 3  # draws of the simulated routers' choices for a window
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


def simulated(profile: Profile, work: Workload, network_s: float, seed: int) -> Served:
    settings = ClusterSettings(
        nodes=NODES,
        clients=1,
        network_s=network_s,
        control=Settings(replicas=NODES, placement_interval_ticks=PLACEMENT_INTERVAL_S),
        seed=seed,
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
    return Served.pooled(
        [simulated(profile, work, network_s, seed) for work in windows for seed in range(ROUTINGS)]
    )


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
    options = {"maxfev": 80, "initial_simplex": simplex, "xatol": 0.02, "fatol": 1e-5}
    best = minimize(error, start, method="Nelder-Mead", options=options).x
    step_s, sequence_s, network_s = np.exp(np.clip(best, -14, -3)).tolist()
    return step_s, sequence_s, network_s
