"""Daemons as real processes."""

import subprocess
import sys
import time
from pathlib import Path


def start(module: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def address_in(port_file: Path, process: subprocess.Popen[str]) -> str:
    """Waits for the file."""
    end = time.monotonic() + 120
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(finish(process)[1])
        time.sleep(0.02)
    return port_file.read_text().strip()


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str]:
    """Its exit code and what it wrote; it is killed where it does not end by itself."""
    try:
        _, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        return process.returncode, errors + "\n(killed)"
    return process.returncode, errors
