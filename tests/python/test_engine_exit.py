"""Engines that end with their program, or are closed by several threads at once."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.demo import MODEL_DIRECTORY
from loraserve.errors import UnavailableError

LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
PROGRAM = f"""
import asyncio, os, sys, threading
from loraserve import Engine, EngineConfig, SamplingParams
engine = Engine(EngineConfig(model={str(MODEL_DIRECTORY)!r}, threads=1))
def submit(**options):
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    return engine.submit([1, 2, 3], params, **options)
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("submit()", 0, ""),
        ("handles = [submit() for _ in range(40)]", 0, ""),
        ("submit(); del engine", 0, ""),
        ("submit(); sys.exit(3)", 3, ""),
        ("submit(); raise ValueError", 1, ""),
        ("submit(); engine.close()", 0, ""),
        ("submit(loop=asyncio.new_event_loop())", 0, ""),
        # Threads that are no daemons are waited for, and answered.
        (
            "handle = submit(); "
            "threading.Thread(target=lambda: print(len(handle.result().token_ids))).start()",
            0,
            "200\n",
        ),
        # A forked child has none of the engine's threads to end.
        (
            "handle = submit()\nif os.fork() == 0: sys.exit(0)\nprint(os.wait()[1])",
            0,
            "0\n",
        ),
    ],
)
def test_a_program_may_end_without_closing(tmp_path: Path, end: str, code: int, said: str) -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM + end],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stdout) == (code, said), done.stderr
        assert "Traceback" not in done.stderr or code == 1


def test_every_thread_that_closes_returns() -> None:
    ended = 0
    for _ in range(5):
        engine = Engine(EngineConfig(model=MODEL_DIRECTORY, threads=1))
        handles = [engine.submit([1] * 40, LONG) for _ in range(20)]
        closers = [threading.Thread(target=engine.close, daemon=True) for _ in range(4)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(60)
        assert not any(closer.is_alive() for closer in closers)
        for handle in handles:
            try:  # where this thread stood still it may be whole
                assert len(handle.result(60).token_ids) == 200
            except UnavailableError:
                ended += 1
        engine.close()
    assert ended, "closing waits for every answer"
