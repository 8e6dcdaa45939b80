"""bench/gpu_engine.py runs: on the emulation, in small, where its numbers mean nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from backend_fixtures import open_backend

SCRIPT = Path(__file__).parents[2] / "bench/gpu_engine.py"


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "gpu_engine.json"
    command = [sys.executable, SCRIPT, "--device", "cuda-emulated", "--tiny", "--out", out]
    subprocess.run(
        [*command, "--models", tmp_path, *arguments],
        check=True,
        timeout=240,
        stdout=subprocess.DEVNULL,
    )
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_script_measures_what_it_says(tmp_path: Path) -> None:
    open_backend("cuda-emulated")
    found = run(tmp_path, "--graphs-off")
    assert found["left_out_for_time"] == []
    decode = {(row["condition"], row["batch"]): row for row in found["decode"]}
    assert len(decode) == 4 * 2
    assert decode["base", 3]["adapter_bytes"] == 0
    # One adapter each of ranks 8, 16 and 32, beside one of rank 128 for all.
    assert decode["mixed", 3]["adapters"] == 3
    assert (
        128 * decode["mixed", 3]["adapter_bytes"] == 56 * decode["shared_r128", 3]["adapter_bytes"]
    )
    for row in decode.values():
        assert row["steps"] > 0
        assert row["step_ms"] > 0
        assert row["kv_bytes"] > 0
    prefill = found["prefill"]
    assert prefill["base_ms"] > 0
    assert all(prefill[f"r{rank}"]["ms"] > 0 for rank in (8, 16, 32, 64, 128))
    assert found["company"]["with_rank_128"]["requests"] >= 2
    assert found["company"]["with_rank_128_to_with_rank_8"].keys() == {"ttft_p95", "tbt_p95"}
    off = {(row["condition"], row["batch"]) for row in found["graphs_off"]}
    assert off == {(c, b) for c in ("base", "mixed") for b in (1, 3)}


def test_what_there_is_no_time_for_is_told(tmp_path: Path) -> None:
    open_backend("cuda-emulated")
    found = run(tmp_path, "--budget", "0")
    assert found["left_out_for_time"] == ["decode 3", "prefill", "decode 1", "company"]
    assert "decode" not in found


def test_a_model_is_written_once(tmp_path: Path) -> None:
    """And again where its shape is another."""
    command = [sys.executable, SCRIPT, "--tiny", "--write-only", "--models", tmp_path]
    weights = tmp_path / "tiny-2/model.safetensors"
    subprocess.run(command, check=True, timeout=120)
    first = weights.stat().st_mtime_ns
    subprocess.run(command, check=True, timeout=120)
    assert weights.stat().st_mtime_ns == first
    (weights.parent / "complete").write_text("another")
    subprocess.run(command, check=True, timeout=120)
    assert weights.stat().st_mtime_ns > first
