"""Changes that a caller who hangs up must not cut in half."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")


async def whole(change: Coroutine[Any, Any, T]) -> T:
    """Runs `change` to its end. A caller that is cancelled meanwhile waits for that, since what the
    change works with may be the caller's, and is cancelled then."""
    task = asyncio.ensure_future(change)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("a change whose caller has gone failed: %s", error)
        raise
