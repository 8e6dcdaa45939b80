"""Profiles of an engine: the fit against a known model, and a short sweep of the real engine."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loraserve.cli import main
from loraserve.demo import MODEL_DIRECTORY
from loraserve.errors import InvalidArgumentError
from loraserve.placement.cost_model import CostModel, Slo, StepLoad
from loraserve.placement.operating_point import LengthMix
from loraserve.profiler import profile_engine
from loraserve.profiler.fit import (
    COEFFICIENTS,
    HINGES,
    Point,
    cross_validate,
    evaluate,
    fit_cost_model,
)
from loraserve.profiler.profile_engine import Measured, ProfileOptions, measure, to_json
from loraserve.profiler.sweep import Grid, scenarios
from loraserve.profiles.files import load_profile

TRUE = CostModel(4e-4, 3e-5, 5e-5, 2e-8, 1e-8, 3e-7, 0.0, 2e-5, 3e-11)


def synthetic(count: int, noise: float, seed: int = 0, true: CostModel = TRUE) -> list[Point]:
    rng = np.random.default_rng(seed)
    points = []
    for _ in range(count):
        prefill, decode = int(rng.integers(0, 400)), int(rng.integers(0, 32))
        adapters = int(rng.integers(0, min(8, prefill + decode) + 1))
        rank = int(rng.choice([8, 16, 64, 128]))
        load = StepLoad(
            prefill_tokens=prefill,
            decode_tokens=decode,
            context_tokens=decode * int(rng.integers(10, 200)),
            chunk_context=prefill * prefill / 2,
            token_ranks=rank * (prefill + decode) if adapters else 0,
            adapters=adapters,
            adapter_bytes=adapters * rank * 30_000,
        )
        if prefill + decode:
            times = true.seconds(load) * (1 + noise * rng.standard_normal(5))
            points.append(Point(load, tuple(float(t) for t in times)))
    return points


def test_the_fit_finds_the_model_that_made_the_points() -> None:
    used = [name for name in COEFFICIENTS if name != "token_max_rank_s"]
    found = fit_cost_model(synthetic(200, 0.0), used)
    for name in COEFFICIENTS:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name
    noisy = fit_cost_model(synthetic(400, 0.02), used)
    report = evaluate(noisy, 400, synthetic(100, 0.0, seed=1))
    assert report.error_p95 < 0.02
    assert report.held_out_points <= 100
    assert evaluate(noisy, 400, synthetic(100, 0.02, seed=1)).noise_p50 < 0.02
    wrong = CostModel(**(vars(TRUE) | {"decode_token_s": 2 * TRUE.decode_token_s}))
    assert evaluate(wrong, 400, synthetic(100, 0.0, seed=1)).error_p95 > 0.05


def test_hinges_are_found_where_the_engine_has_them_and_only_there() -> None:
    used = [name for name in COEFFICIENTS if name != "token_max_rank_s"]
    assert fit_cost_model(synthetic(200, 0.01), used).batch_token_s == 0
    assert fit_cost_model(synthetic(200, 0.01), used).spill_byte_s == 0
    hinged = replace(
        TRUE,
        batch_token_s=4e-5,
        batch_tokens=16,
        spill_byte_s=2e-10,
        cache_bytes=float(4 << 20),
        context_bytes=2048,
    )
    points = synthetic(300, 0.0, true=hinged)
    found = fit_cost_model(points, used)
    for name, value in vars(hinged).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5), name
    held_out = synthetic(100, 0.0, seed=1, true=hinged)
    assert evaluate(found, 300, held_out).error_max < 1e-5
    flat = fit_cost_model(points, [name for name in used if name not in HINGES])
    assert evaluate(flat, 300, held_out).error_max > 0.1


def test_every_point_is_held_out_once() -> None:
    """A model that was fitted on a point that nothing else is like would know it."""
    used = ["step_s", "prefill_token_s", "decode_token_s", "adapter_s"]
    points = [Point(StepLoad(prefill_tokens=n), (1e-3 + n * 1e-5,) * 5) for n in range(1, 21)] + [
        Point(StepLoad(prefill_tokens=5, adapters=1), (1.0,) * 5)
    ]
    assert evaluate(fit_cost_model(points, used), 21, points).error_max < 1e-6
    report = cross_validate(points, 4, used)
    assert (report.fitted_points, report.held_out_points) == (16, 21)
    assert report.error_p95 < 1e-6
    assert report.error_max > 0.9


def test_noisy_points_count_less() -> None:
    """A tenth of the points is three times too slow in every other repeat."""
    used = [name for name in COEFFICIENTS if name != "token_max_rank_s"]
    points = [
        p
        if i % 10
        else Point(p.load, tuple(s * (3 if j % 2 else 1) for j, s in enumerate(p.seconds)))
        for i, p in enumerate(synthetic(300, 0.0))
    ]
    assert evaluate(fit_cost_model(points, used), 300, synthetic(100, 0.0, 1)).error_p95 < 0.05


def test_too_few_points_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="points"):
        fit_cost_model(synthetic(5, 0.0))


def test_scenarios_keep_to_what_the_engine_takes() -> None:
    for scenario in scenarios(Grid(), 2, 16, 100):
        assert len(scenario.adapters) < 16
        assert all(tokens <= 100 for tokens in scenario.prefills)
        assert all(a is None or a[1] < 2 for a in scenario.adapters)


def test_a_sweep_of_the_engine_gives_a_profile_that_the_simulator_reads(tmp_path: Path) -> None:
    grid = Grid((1, 8), (16, 64), (8, 128), adapters_per_rank=2, repeats=5)
    options = ProfileOptions(
        model=MODEL_DIRECTORY, base="demo", activation_dtype="bfloat16", threads=1, grid=grid
    )
    # What else this machine does may spoil a sweep, and does not spoil three.
    for _ in range(3):
        measured = measure(options)
        if measured.report.error_p50 < 0.5 and falls(measured):
            break
    assert measured.report.held_out_points >= 5
    assert measured.report.error_p50 < 0.5
    assert measured.profile.cost.prefill_token_s > 0
    assert measured.profile.name.endswith("activations bfloat16")
    # Four layers of seven modules, float32, ranks rounded up to 8: some 27 kB for each rank.
    assert 27_000 < measured.profile.bytes_per_rank < 60_000
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(to_json(measured, Slo(), LengthMix(64, 32, 4))))
    assert load_profile(str(path)) == measured.profile
    assert falls(measured)


def falls(measured: Measured) -> bool:
    """Whether the operating points are lower for higher ranks."""
    try:
        written = to_json(measured, Slo(), LengthMix(64, 32, 4))
    except InvalidArgumentError:  # an empty step that would break the objective
        return False
    rates = written["measured"]["operating_points_tokens_per_s"]
    falling = [rates[rank] for rank in ("8", "32", "128", "512")]
    return falling == sorted(falling, reverse=True) and falling[0] > falling[-1] > 0


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--model", "/nowhere", "-o", "OUT"], "--model: /nowhere: config.json: not found"),
        (["--model", "MODEL", "-o", "OUT", "--repeats", "1"], "--repeats: "),
        (["--model", "MODEL", "-o", "/nowhere/p.json"], "-o: /nowhere: "),
        (["--model", "MODEL", "-o", "OUT", "--device", "abacus"], "--device: "),
        (["--model", "MODEL", "-o", "OUT", "--memory-bytes", "1000000"], "--memory-bytes: "),
    ],
)
def test_what_cannot_be_profiled_is_refused(
    words: list[str], field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"OUT": str(tmp_path / "p.json"), "MODEL": str(MODEL_DIRECTORY)}
    code = main(["bench", "profile", *(known.get(word, word) for word in words)])
    assert code == (1 if "--memory-bytes" in words else 2)
    assert f"loraserve bench profile: error: {field}" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_without_scipy_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    monkeypatch.setattr(profile_engine, "Sweep", lambda *_: pytest.fail("it measures"))
    words = ["--model", str(MODEL_DIRECTORY), "-o", str(tmp_path / "p.json")]
    assert main(["bench", "profile", *words]) == 1
    assert "error: scipy: fitting needs it" in capsys.readouterr().err
