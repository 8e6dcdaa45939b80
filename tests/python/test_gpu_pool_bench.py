"""bench/gpu_pool.py runs: on the emulation, in small, where its numbers mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

from backend_fixtures import open_backend

SCRIPT = Path(__file__).parents[2] / "bench/gpu_pool.py"


def test_the_script_measures_what_it_says(tmp_path: Path) -> None:
    open_backend("cuda-emulated")
    out = tmp_path / "gpu_pool.json"
    subprocess.run(
        [sys.executable, SCRIPT, "--device", "cuda-emulated", "--tiny", "--out", out],
        check=True,
        timeout=600,
        stdout=subprocess.DEVNULL,
    )
    found = json.loads(out.read_text())
    assert found["page_locked"]
    assert found["copies"]["pinned_gb_per_s"] > 0
    pinned, pageable = found["installs"]["pinned"], found["installs"]["pageable"]
    assert pinned["read_directly_bytes"] > 0
    assert pinned["staged_bytes"] == 0
    assert pageable["read_directly_bytes"] == 0
    assert pageable["staged_bytes"] == pinned["read_directly_bytes"]
    assert found["decode"]["alone"]["tokens"] > 0
    assert found["decode"]["beside_installs"]["installs"] >= 0
