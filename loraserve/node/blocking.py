"""Blocking calls that may never return, away from the event loop."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar, cast

from loraserve.errors import UnavailableError

T = TypeVar("T")


class BlockingCalls:
    """As asyncio.to_thread; but a call that never returns takes no thread of a pool from others,
    and does not keep the process from ending. Event loop only."""

    def __init__(self, name: str, max_calls: int) -> None:
        """`name`: of the threads, and the field of errors. `max_calls`: at a time, those included
        that nobody waits for any more."""
        self._name = name
        self._max_calls = max_calls
        self.running = 0

    async def run(self, call: Callable[[], T]) -> T:
        """Raises what `call` raises, UnavailableError where too many hang."""
        if self.running >= self._max_calls:
            raise UnavailableError(self._name, f"{self.running} calls have not returned")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self.running += 1

        def settle(result: T | None, error: Exception | None) -> None:
            self.running -= 1
            if done.done():  # nobody waits any more
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(cast(T, result))

        def run() -> None:
            result, failure = None, None
            try:
                result = call()
            except Exception as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(settle, result, failure)

        threading.Thread(target=run, name=f"{self._name}-call", daemon=True).start()
        return await done
