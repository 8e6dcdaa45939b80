"""bench/rdma_report.sh: its exit code and last lines say what failed, and the report is written."""

import json
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/rdma_report.sh"
# Stands in for `loraserve node doctor`.
PROGRAM = """#!/bin/sh
case "$*" in
  *--offer*) echo offered ;;
  *--read-from*) {reads} ;;
  *--gpudirect*) {here} ;;
  *) {there} ;;
esac
"""
WELL = """echo '[{"name": "rdma", "ok": true, "detail": "mlx5"}]'"""
LACKS = """echo '[{"name": "rdma", "ok": false, "detail": "no card"}]'; exit 1"""
READ = """cat >/dev/null; echo '{"reads": []}'"""
BROKEN = "cat >/dev/null; echo first >&2; echo 'read nothing: no UCX' >&2; exit 3"


def report(tmp_path: Path, program: Path) -> tuple[int, list[str], dict[str, dict[str, object]]]:
    """Exit code, lines on stderr, what was written."""
    out = tmp_path / "report.json"
    done = subprocess.run(
        ["bash", SCRIPT, "local", out],
        env={"PATH": "/usr/bin:/bin", "LORASERVE": str(program), "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr.splitlines(), json.loads(out.read_text())


@pytest.mark.parametrize(
    ("parts", "failed"),
    [
        ({}, []),
        ({"here": LACKS}, ["here_doctor, exit 1: rdma: no card"]),
        ({"reads": BROKEN}, ["reads, exit 3: read nothing: no UCX"]),
        (
            {"there": "exit 5", "reads": BROKEN},
            ["there_doctor, exit 5: it says nothing", "reads, exit 3: read nothing: no UCX"],
        ),
    ],
)
def test_what_failed_is_said(tmp_path: Path, parts: dict[str, str], failed: list[str]) -> None:
    program = tmp_path / "loraserve"
    program.write_text(PROGRAM.format(**{"here": WELL, "there": WELL, "reads": READ, **parts}))
    program.chmod(0o755)
    code, lines, written = report(tmp_path, program)
    assert [line for line in lines if "FAILED" in line] == [
        f"rdma_report: FAILED: {text}" for text in failed
    ]
    assert code == (1 if failed else 0)
    assert written["loraserve_rdma_report"] == 1
    assert written["reads"]["exit"] == (3 if "reads" in parts else 0)


def test_a_command_that_is_not_there_is_said(tmp_path: Path) -> None:
    code, lines, _ = report(tmp_path, tmp_path / "absent")
    assert code == 1
    assert sum("FAILED" in line and "absent" in line for line in lines) == 3
