"""`make test` runs the few tests that failed once more, alone, and hides none that fails twice."""

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "run_tests.py"

LUCKY = """
from pathlib import Path

def test_fails_the_first_time():
    seen = Path(__file__).with_name("seen")
    first = not seen.exists()
    seen.touch()
    assert not first
"""
FAILS = "def test_fails(): assert False\n"
MANY = "import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test_fails(n): assert False\n"
PASSES = "def test_passes(): pass\n"


def ran(tmp_path: Path, **files: str) -> tuple[int, str]:
    for name, text in files.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # not this project's settings
    done = subprocess.run(
        [sys.executable, str(TOOL), "."], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_a_test_that_passes_alone_is_told_by_name(tmp_path: Path) -> None:
    status, said = ran(tmp_path, lucky=LUCKY, passes=PASSES)
    assert status == 0, said
    assert "PASSED ONLY ALONE" in said
    assert "test_lucky.py::test_fails_the_first_time" in said.split("PASSED ONLY ALONE")[1]


def test_failing_twice_is_a_failure(tmp_path: Path) -> None:
    status, said = ran(tmp_path, lucky=LUCKY, fails=FAILS)
    assert status == 1, said
    assert "PASSED ONLY ALONE" not in said


def test_many_failures_count_at_once(tmp_path: Path) -> None:
    status, said = ran(tmp_path, many=MANY)
    assert status == 1, said
    assert "once more" not in said


def test_a_file_that_does_not_import_is_no_matter_of_timing(tmp_path: Path) -> None:
    status, said = ran(tmp_path, broken="import nothing_of_this_name\n", passes=PASSES)
    assert status == 2, said
    assert "once more" not in said


def test_what_passes_ends_with_zero(tmp_path: Path) -> None:
    status, said = ran(tmp_path, passes=PASSES)
    assert status == 0, said
    assert "once more" not in said
