"""What every result says of itself: command, commit, machine and load."""

import os
import platform
import subprocess
import sys
from typing import Any

from loraserve.node.model import cpu_name


def commit() -> str:
    """Short, with "-dirty" where files differ from it, results apart, which change nothing that is
    measured; "unknown" outside a checkout, or where there is no git."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    sources = (":/", ":(exclude,top)bench/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        "-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", *sources) else ""
    )


def measured_on() -> dict[str, Any]:
    """Taken now: call it when the measurement begins."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        },
        "load_average": os.getloadavg(),
    }
