"""The claims machinery: its measures on made-up curves, and one small run from end to end."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loraserve.cli import main
from loraserve.commands import simulate
from loraserve.placement.policies import POLICIES
from loraserve.sim import claims
from loraserve.sim.claims_measures import (
    knee,
    nodes_needed,
    rank_blind,
    recovery_s,
    sustained_rate,
)
from loraserve.sim.claims_runs import flat_scale


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"rate_per_s": r, "slo_attainment": a, "load": r, "nodes": r} for r, a in points]


def test_sustained_rate() -> None:
    assert sustained_rate(curve((1, 1.0), (2, 0.98), (3, 0.82))) == (pytest.approx(2.5), False)
    assert sustained_rate(curve((1, 1.0), (2, 0.95))) == (2, True)
    assert sustained_rate(curve((2, 0.8))) == (pytest.approx(1.0), False)
    # What comes back after a fall does not count.
    assert sustained_rate(curve((1, 0.8), (2, 1.0)))[0] == pytest.approx(0.5)


def test_knee_and_nodes() -> None:
    assert knee(curve((1, 1.0), (2, 0.9), (3, 0.89)))["rate_per_s"] == 3  # type: ignore[index]
    assert knee(curve((1, 1.0))) is None
    assert nodes_needed(curve((2, 0.1), (3, 0.95), (4, 0.5), (5, 0.9), (6, 1.0))) == 5  # type: ignore[arg-type]
    assert nodes_needed(curve((2, 0.1), (3, 0.5))) is None


def test_recovery() -> None:
    assert recovery_s([1, 1, 0.5, 0.6, 1, 0.8, 1, 1, 1, 1], 10, 20) == 40
    assert recovery_s([1, 1, 1, 1, 1], 10, 20) == 0
    assert recovery_s([1, 1, 0.5, 0.5, 0.5], 10, 20) is None


def test_baselines() -> None:
    assert rank_blind(["hash", "paper", "rank_aware", "random"], "rank_aware") == ["hash", "random"]
    assert rank_blind(["a", "ours"], "ours") == ["a"]
    assert rank_blind(["ours"], "ours") == ["ours"]


def test_flat_coefficients_have_hardly_any_effect() -> None:
    assert 0.01 < flat_scale() < 0.5


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(
        claims.QUICK,
        cases=tuple(replace(c, adapters=10, nodes=2) for c in claims.QUICK.cases),
        loads=(0.7,),
        node_counts=(2,),
        duration_s=20.0,
        interval_s=10.0,
    )
    monkeypatch.setattr(claims, "QUICK", plan)
    report = claims.run_claims(quick=True, workers=1, output=tmp_path)
    text = report.read_text()
    written = json.loads((tmp_path / "placement.json").read_text())
    assert {(r["case"], r["engine"], r["policy"], r["scale"]) for r in written["rows"]} == {
        (s.case.name, s.engine, s.policy, s.scale) for s in claims.sweeps_of(plan)
    }
    assert {r["policy"] for r in written["rows"]} == set(POLICIES)
    for heading in ("Sustained", "TTFT p95", "Nodes needed", "memory", "Recovery", "Sensitivity"):
        assert heading in text
    for name in ("ttft_p95-padded.png", "slo_attainment-proportional.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in text


def test_without_matplotlib_nothing_is_run_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(claims, "_run_all", lambda *_: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", "claims", "--quick"]) == 1
    assert "error: plots: they need matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "directory"),
    [([], "claims"), (["--quick"], "claims-quick"), (["--quick", "--output", "mine"], "mine")],
)
def test_a_quick_report_has_a_directory_of_its_own(
    words: list[str], directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[Path] = []

    def run(quick: bool, workers: int, output: Path, say: object) -> Path:
        outputs.append(output)
        return output

    monkeypatch.setattr(simulate, "run_claims", run)
    assert main(["simulate", "claims", *words]) == 0
    assert outputs == [Path(directory)]
