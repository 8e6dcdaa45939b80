"""Work beside serving: reading and checking adapters, in threads that give way to the engine's.

However many adapters load at a time, their bytes are read and checked by a few threads, which run
where serving leaves a core. They are shared by the process and start with the first call.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_THREADS = 2
_NICER = 5  # as the engine's installer; see csrc/engine/installer.cc


def give_way() -> None:
    """Lowers the priority of the calling thread, for good, where the system has one for threads."""
    if hasattr(os, "setpriority") and os.uname().sysname == "Linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(
                os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER
            )


def background_threads(count: int, name: str) -> ThreadPoolExecutor:
    """An executor whose threads give way."""
    return ThreadPoolExecutor(count, name, initializer=give_way)


_threads = background_threads(_THREADS, "adapter-bytes")


def run_in_background(call: Callable[[], T]) -> T:
    """What `call` returns or raises, from one of the threads; waits for it."""
    return _threads.submit(call).result()


async def in_background(call: Callable[[], T]) -> T:
    """As `run_in_background`, for an event loop."""
    return await asyncio.get_running_loop().run_in_executor(_threads, call)


def _after_fork() -> None:
    """A forked child has none of the threads."""
    global _threads
    _threads = background_threads(_THREADS, "adapter-bytes")


os.register_at_fork(after_in_child=_after_fork)
