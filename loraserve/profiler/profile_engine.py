"""From an engine to its Profile: sweep, fit, check on points that were held out in turn."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loraserve.engine import Engine, EngineConfig
from loraserve.placement.cost_model import CostModel, Profile, Slo
from loraserve.placement.operating_point import LengthMix, operating_points
from loraserve.profiler.fit import (
    COEFFICIENTS,
    FitReport,
    Point,
    cross_validate,
    fit_cost_model,
    nnls_function,
)
from loraserve.profiler.sweep import Grid, Sweep, scenarios

# Parts of the points that are held out in turn to know the error; the profile is fitted on all.
_FOLDS = 4
# Beside the decoding sequences, of the longest prompt that is measured.
_SPARE_CONTEXT = 32


@dataclass(frozen=True)
class ProfileOptions:
    """Sizes in bytes and tokens, as the node that will run with the profile has them."""

    model: Path
    base: str = ""
    device: str = "cpu"
    weight_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_bytes: int = 2 << 30
    max_batch_tokens: int = 512
    max_sequences: int = 64
    threads: int = 0
    grid: Grid = field(default_factory=Grid)
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """The profile, how far it can be trusted, and what it was made from."""

    profile: Profile
    report: FitReport
    points: tuple[Point, ...]


def measure(
    options: ProfileOptions, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Measured:
    """Takes minutes. `on_progress` is called with scenarios done and in all. Raises
    LoraServeError; before it measures anything, FailedPreconditionError where scipy is missing."""
    nnls_function()
    config = EngineConfig(
        model=options.model,
        device=options.device,
        weight_dtype=options.weight_dtype,
        activation_dtype=options.activation_dtype,
        memory_bytes=options.memory_bytes,
        max_batch_tokens=options.max_batch_tokens,
        max_sequences=options.max_sequences,
        threads=options.threads,
        prefix_cache=False,
        record_steps=True,
    )
    with Engine(config) as engine:
        sweep = Sweep(engine, options.grid, options.seed)
        loaded = sweep.load_adapters(options.memory_bytes // 2)
        room = min(options.max_batch_tokens, engine.model_config.max_position - _SPARE_CONTEXT)
        wanted = scenarios(options.grid, loaded, options.max_sequences, room)
        total, done = len(wanted) * (options.grid.repeats + 1), 0

        def step() -> None:
            nonlocal done
            done += 1
            on_progress(done, total)

        points = sweep.points(wanted, step)
        stats = engine.stats()
        pages = stats.pages_free + stats.pages_kv + stats.pages_adapter
        backend, threads = engine.backend_name, options.threads or "all"
    cost, report = _fitted(points, options.seed)
    profile = Profile(
        name=f"{options.base or options.model.name} on {backend}",
        base=options.base or options.model.name,
        device=options.device,
        cost=cost,
        max_batch_tokens=options.max_batch_tokens,
        max_sequences=options.max_sequences,
        bytes_per_rank=_bytes_per_rank(points),
        kv_tokens=0,
        source=f"measured on {backend}, {threads} threads, arena of {pages} pages of "
        f"{stats.page_bytes} bytes: {report.held_out_points} points, each "
        f"held out once, error p50 {report.error_p50:.1%} p95 "
        f"{report.error_p95:.1%}, noise p50 {report.noise_p50:.1%} p95 {report.noise_p95:.1%}",
    )
    return Measured(profile, report, tuple(points))


def _fitted(points: list[Point], seed: int) -> tuple[CostModel, FitReport]:
    order = list(points)
    random.Random(seed).shuffle(order)
    # This engine does not pad; a coefficient for it would only take what is others'.
    used = [name for name in COEFFICIENTS if name != "token_max_rank_s"]
    return fit_cost_model(order, used), cross_validate(order, _FOLDS, used)


def _bytes_per_rank(points: list[Point]) -> int:
    """As adapters of one rank lie in pages, per rank."""
    found = [
        p.load.adapter_bytes / p.load.adapters * (p.load.prefill_tokens + p.load.decode_tokens)
        / p.load.token_ranks
        for p in points
        if p.load.adapters and p.load.token_ranks == p.load.token_max_rank
    ]  # fmt: skip
    return max(1, round(min(found))) if found else 1


def to_json(measured: Measured, slo: Slo, mix: LengthMix) -> dict[str, Any]:
    """The profile's fields as `load_profile` reads them, and under "measured" what stands behind
    them: errors, noise, and the operating point of each rank at this SLO and mix."""
    profile = measured.profile
    values = dict(vars(profile)) | {"cost": dict(vars(profile.cost))}
    points = operating_points(profile, slo, mix)
    values["measured"] = {
        **vars(measured.report),
        "slo": dict(vars(slo)),
        "mix": dict(vars(mix)),
        "operating_points_tokens_per_s": {
            str(rank): round(float(points.tokens_per_s[rank]), 1)
            for rank in (0, 8, 16, 32, 64, 128, 256, 512)
        },
        "points": [
            {**vars(p.load), "median_s": p.median_s, "noise": round(p.noise, 4)}
            for p in measured.points
        ],
    }
    return values
