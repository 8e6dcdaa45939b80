"""`loraserve demo`, shortened."""

import json
import subprocess
import sys
from pathlib import Path

from loraserve.demo.skills import SKILLS


def test_the_demo_passes_and_tells_what_it_did(tmp_path: Path) -> None:
    words = ["--seconds", "4", "--rate", "50", "--burst", "60", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "loraserve.cli", "demo", *words, "--directory", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1])
    assert result["passed"] is True
    assert result["requests"] > 150
    assert result["correct"] >= 0.95 * result["requests"]
    assert result["lost"] == 0
    # Of the 60 that come at once, a fast machine answers some before the last is sent.
    assert result["most_in_flight"] >= result["most_adapters_in_flight"] >= 2
    assert set(result["by_rank"]) <= {str(skill.rank) for skill in SKILLS}
    rows = result["by_rank"].values()
    assert sum(row["requests"] for row in rows) == result["requests"]
    assert all(0 < row["ttft_p50_s"] <= row["ttft_p95_s"] for row in rows)
    assert result["tokens_per_s"] > 0
    held = [name.split()[0] for names in result["nodes"].values() for name in names]
    assert set(held) == {skill.name for skill in SKILLS}  # some twice, where a burst made replicas
    assert len(result["nodes"]) == 2
    # The burst comes to nodes that do not hold what it asks for.
    assert sum(result["peer_reads"].values()) > 0
    assert set(result["peer_reads"]) <= {"ucx", "grpc"}
    assert (
        f"nodes read {sum(result['peer_reads'].values())} adapters from each other" in done.stdout
    )
    # The same for people.
    text = done.stdout
    assert "PASSED" in text
    assert "TTFT p95" in text
    for node in result["nodes"]:
        assert f"{node} holds" in text
    # Every daemon says when it is ready and ends in order.
    for name in ("controller", "node-1", "node-2"):
        log = (tmp_path / f"{name}.log").read_text()
        assert "serves on" in log or "serving on" in log
        assert log.splitlines()[-1].endswith("stopped"), log
        assert "Traceback" not in log
    # The same directory serves again.
    words = ["--seconds", "1", "--rate", "20", "--burst", "5", "--directory", str(tmp_path)]
    again = subprocess.run(
        [sys.executable, "-m", "loraserve.cli", "demo", *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "adapter upper: rank 4" in again.stdout, again.stdout + again.stderr
    assert "PASSED" in again.stdout, again.stdout
