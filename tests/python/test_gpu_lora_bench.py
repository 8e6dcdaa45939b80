"""bench/gpu_lora.py runs: on the emulation, in small, where its numbers mean nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from backend_fixtures import open_backend

SCRIPT = Path(__file__).parents[2] / "bench/gpu_lora.py"
WIDTHS = 928  # inputs and outputs of a layer's seven modules
LAYERS = 2


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "gpu_lora.json"
    command = [sys.executable, SCRIPT, "--device", "cuda-emulated", "--tiny", "--out", out]
    subprocess.run([*command, *arguments], check=True, timeout=240, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_script_measures_what_it_says(tmp_path: Path) -> None:
    open_backend("cuda-emulated")
    found = run(tmp_path)
    points = {(p["batch"], p["popularity"], p["rank"]): p for p in found["points"]}
    assert len(points) == len(found["points"]) == 3 + 3 + 2 * 4
    for point in points.values():
        assert point["ms"] > 0
        assert point["to_floor"] > 0
        assert point["gb_per_s"] >= 0
    # Three adapters of ranks 8, 24 and 40 among five sequences.
    mixed = points[5, "uniform", "mixed"]
    assert mixed["distinct"] == 3
    assert mixed["needed_bytes"] == 2 * LAYERS * WIDTHS * (8 + 24 + 40)
    assert points[5, "uniform", 8]["needed_bytes"] == 2 * LAYERS * WIDTHS * 3 * 8
    assert points[5, "same", 40]["needed_bytes"] == 2 * LAYERS * WIDTHS * 40
    assert mixed["to_homogeneous"] == pytest.approx(
        mixed["net_ms"] / (sum(points[5, "uniform", r]["net_ms"] for r in (8, 24, 40)) / 3), rel=0.1
    )
    assert points[5, "uniform", 40]["to_padded"] == 1


def test_what_there_is_no_time_for_is_told(tmp_path: Path) -> None:
    open_backend("cuda-emulated")
    found = run(tmp_path, "--budget", "0", "--gb-per-s", "100")
    assert found["points"] == []
    assert found["points_left_out_for_time"] == 4
    assert found["ceilings"] == {
        "gb_per_s": 100.0,
        "gemm_tflop_per_s": None,
        "measured_with": "given",
    }
