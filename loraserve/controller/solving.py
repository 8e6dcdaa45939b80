"""Whole placements in threads of their own. Nobody waits for one that does not end: neither what
else is done in threads nor the end of the process."""

import asyncio
import contextlib
import logging
import threading

from loraserve.controller.events import PlacementComputed, PlacementFailed
from loraserve.controller.placing import PlacementQuestion, solve

_log = logging.getLogger(__name__)

# Threads that have not ended, with which no other is begun.
MOST_UNANSWERED = 3

Answer = PlacementComputed | PlacementFailed


class Solving:
    """Lives on one event loop."""

    def __init__(self) -> None:
        self._unanswered = 0

    async def answer(self, question: PlacementQuestion) -> Answer:
        """Whatever goes wrong is an answer too. Where the caller is cancelled, the thread goes on
        by itself."""
        if self._unanswered >= MOST_UNANSWERED:
            return PlacementFailed(question, f"{self._unanswered} placements have not ended yet")
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Answer] = loop.create_future()

        def take(answer: Answer) -> None:
            self._unanswered -= 1
            if not found.done():
                found.set_result(answer)

        def work() -> None:
            answer = _answer(question)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(take, answer)

        try:
            threading.Thread(target=work, name="placement", daemon=True).start()
        except RuntimeError as error:  # no more threads
            return PlacementFailed(question, str(error))
        self._unanswered += 1
        return await found


def _answer(question: PlacementQuestion) -> Answer:
    try:
        return PlacementComputed(solve(question))
    except BaseException as error:
        _log.exception("a placement failed")
        return PlacementFailed(question, f"{type(error).__name__}: {error}")
