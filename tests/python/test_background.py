"""Threads that read and check adapters give way to those that serve."""

import asyncio
import os
import sys
import threading

import pytest

from loraserve.background import background_threads, in_background, run_in_background


def nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_background_threads_are_nicer_and_the_callers_stay_as_they_are() -> None:
    before = nice()
    assert run_in_background(nice) == min(before + 5, 19)
    assert asyncio.run(in_background(nice)) == min(before + 5, 19)
    with background_threads(1, "test") as threads:
        # Once for each thread, not for each call.
        assert {threads.submit(nice).result() for _ in range(3)} == {min(before + 5, 19)}
    assert nice() == before


def test_what_a_call_raises_comes_back() -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_in_background(fail)
    with pytest.raises(KeyError):
        asyncio.run(in_background(fail))


def test_no_more_than_a_few_run_at_a_time() -> None:
    running, most, lock = 0, 0, threading.Lock()
    go_on = threading.Event()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        go_on.wait(30)
        with lock:
            running -= 1

    callers = [threading.Thread(target=run_in_background, args=(work,)) for _ in range(16)]
    for caller in callers:
        caller.start()
    go_on.set()
    for caller in callers:
        caller.join(30)
    assert 1 <= most <= 2
