"""The gaps in streams whose node is killed: 64 streams, 100 kills of nodes that come back.

    python bench/resume_gaps.py [--kills N] [--streams N] [--max-tokens N] [--pause-s S]
        [--out FILE]

Three nodes of the demo model, one engine thread each, a controller and one client, all on this
machine: the test of tests/integration/test_kills.py with a clock. Every answer is compared with
that of an undisturbed run. A gap is the time between the last chunk from the killed node and the
first from the next; given are the gap, its part until the request was sent again, the queue and
prefill that the next node reports, and what is left of the gap beyond that prefill. Node exits are
from the signal until the system has taken the process apart, which is when its connections end.
Without a pause between answers the streams take all that the machine has, and every gap holds the
wait for a core; with one, they leave it room. One JSON object with machine, load, commit and
command.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))

from kill_run import ADAPTERS, CONTROLLER_OPTIONS, NODES, KillRun, Report, cases
from served_cluster import running

from loraserve import AsyncClient


def spread(seconds: Iterable[float]) -> dict[str, float | int]:
    """In milliseconds."""
    found = sorted(seconds)
    if not found:
        return {"count": 0}

    def at(part: float) -> float:
        return round(1000 * found[min(len(found) - 1, int(part * len(found)))], 1)

    return {
        "count": len(found),
        "p50_ms": at(0.5),
        "p90_ms": at(0.9),
        "p99_ms": at(0.99),
        "max_ms": at(1.0),
    }


def told(report: Report) -> dict[str, Any]:
    gaps = report.gaps
    return {
        "kills": report.kills,
        "answers": report.answers,
        "tokens": report.tokens,
        "tokens_lost": report.lost,
        "tokens_doubled": report.doubled,
        "answers_wrong": len(report.wrong),
        "answers_by_attempts": {str(n): report.attempts[n] for n in sorted(report.attempts)},
        "gap": spread(g.whole for g in gaps),
        "gap_beyond_prefill": spread(g.beyond_prefill for g in gaps),
        "gap_beyond_queue_and_prefill": spread(g.whole - g.queue - g.prefill for g in gaps),
        "until_sent_again": spread(g.until_sent for g in gaps),
        "queue": spread(g.queue for g in gaps),
        "prefill": spread(g.prefill for g in gaps),
        "first_token_of_new_requests": spread(report.first_tokens),
        "node_exit": spread(report.exit_times),
        "node_back_with_all_adapters": spread(report.back_times),
        "answer": spread(report.answer_times),
    }


def measured(kills: int, streams: int, max_tokens: int, pause_s: float) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as directory,
        running(
            Path(directory), nodes=NODES, skills=ADAPTERS, controller_options=CONTROLLER_OPTIONS
        ) as (cluster, _),
    ):

        async def run() -> dict[str, Any]:
            async with AsyncClient(cluster.address) as client:
                run = KillRun(cluster, client, cases(streams, max_tokens), pause_s)
                await run.undisturbed()
                before, begin = os.getloadavg(), time.monotonic()
                report = await run.disturbed(kills)
                seconds = time.monotonic() - begin
                return {
                    "seconds": round(seconds, 1),
                    "tokens_per_s": round(report.tokens / seconds),
                    "load_average_before": before,
                    "load_average_after": os.getloadavg(),
                    **told(report),
                }

        return asyncio.run(run())


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--pause-s", type=float, default=0.0, help="mean, between two answers")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "machine": {
            "cpus": len(os.sched_getaffinity(0)),
            "system": platform.system(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        "streams": given.streams,
        "max_tokens": given.max_tokens,
        "nodes": NODES,
        "mean_pause_s": given.pause_s,
        **measured(given.kills, given.streams, given.max_tokens, given.pause_s),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    if result["tokens_lost"] or result["tokens_doubled"] or result["answers_wrong"]:
        sys.exit("answers are not those of an undisturbed run")


if __name__ == "__main__":
    main()
