"""The gateway's benchmark, shortened: that it still runs, not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "gateway_tokens.py"


def test_the_gateway_benchmark_runs_and_counts(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["--streams", "4", "--tokens-per-s", "200", "--seconds", "1"]
    words += ["--requests", "4", "--parts", "tokens,latency", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(BENCH), *words], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert [row["tokens_per_s"] > 0 for row in result["tokens"]] == [True]
    assert result["latency"]["http"]["ttft_p50_ms"] > 0
