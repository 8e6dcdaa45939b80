"""aiperf, unmodified: several adapters round robin, and no error among its requests."""

import json
from collections import Counter
from pathlib import Path

import pytest
from client_venv import client_scripts, documented, run_documented
from served_http import ServedHttp

pytestmark = pytest.mark.clients

ADAPTERS = ("reverse", "upper", "stars")
REQUESTS = 60


def test_adapters_round_robin(front: ServedHttp, tmp_path: Path) -> None:
    requirement, script = documented("aiperf")
    scripts = client_scripts("aiperf", requirement)
    # Offline, it takes no tokenizer from a directory; this one needs no network either way. Its
    # dozen processes take longer to start on a busy machine than it waits for by itself.
    slow = {f"AIPERF_SERVICE_{name}_TIMEOUT": "300" for name in ("REGISTRATION", "START")}
    script += " --ui-type none --export-level raw --output-artifact-dir out"
    run_documented(scripts, script, front.url, tmp_path, {"HF_HUB_OFFLINE": "", **slow})
    told = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert told["error_summary"] == []
    assert told["request_count"]["avg"] == REQUESTS
    lines = (tmp_path / "out" / "profile_export_raw.jsonl").read_text().splitlines()
    asked: Counter[str] = Counter()
    for record in map(json.loads, lines):
        assert record["status"] == 200
        first = json.loads(record["responses"][0]["packets"][0]["value"])
        asked[first["model"]] += 1
    assert asked == dict.fromkeys(ADAPTERS, REQUESTS // len(ADAPTERS))
