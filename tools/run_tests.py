"""Runs pytest; what failed in a run with few failures gets one second run, alone.

Usage: `run_tests.py [PYTEST ARGUMENT ...]`, as `make test` does. Not for `make fuzz` and
`make soak`: those look for what comes seldom, and a second run would skip what the first found.

Hundreds of these tests start daemons, kill them and wait for what others notice. On a machine that
is busy with something else one of them may miss its deadline. Failing twice is a failure; passing
alone after failing among others is told by name, and is a defect of the test to be mended.
More than `MOST_AGAIN` failures are never a matter of timing: they count at once.
Ends with pytest's exit status (of the second run where there was one).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

MOST_AGAIN = 4
TESTS_FAILED = 1  # pytest's exit status; others (usage, interrupted, nothing collected) stand


def run(arguments: list[str], cache: Path) -> int:
    """One pytest run; `cache` is its own, so that runs beside each other do not mix failures."""
    command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={cache}", *arguments]
    return subprocess.run(command, check=False).returncode


def failed(cache: Path) -> list[str]:
    """Ids of the tests that the last run with this cache saw fail."""
    record = cache / "v" / "cache" / "lastfailed"
    return sorted(json.loads(record.read_text())) if record.exists() else []


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="loraserve-tests-") as directory:
        cache = Path(directory)
        status = run(arguments, cache)
        names = failed(cache)
        if status != TESTS_FAILED or not 0 < len(names) <= MOST_AGAIN:
            return status
        print(f"\n{len(names)} failed; once more, alone:", *names, sep="\n  ", flush=True)
        status = run([*arguments, "--last-failed", "--last-failed-no-failures=none"], cache)
        if status == 0:
            print("PASSED ONLY ALONE (mend these tests):", *names, sep="\n  ", flush=True)
        return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
