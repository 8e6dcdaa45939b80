"""Attempts as spans of a trace."""

import contextlib
from collections.abc import AsyncGenerator, Callable

from loraserve.client.resume import AnswerLog
from loraserve.client.types import Chunk
from loraserve.errors import LoraServeError
from loraserve.tracing import Span


async def in_span(
    parent: Span,
    node_id: str,
    number: int,
    log: AnswerLog,
    attempt: Callable[[str], AsyncGenerator[Chunk, None]],
) -> AsyncGenerator[Chunk, None]:
    """The chunks of an attempt, which is given the traceparent to send on."""
    about: dict[str, str | int] = {"loraserve.node": node_id, "loraserve.attempt": number}
    span = parent.child("attempt", about)
    error: str | None = "CANCELLED"
    try:
        async with contextlib.aclosing(attempt(span.traceparent)) as chunks:
            async for chunk in chunks:
                if chunk.finish_reason is not None:
                    error = None
                yield chunk
        error = None
    except LoraServeError as failure:
        error = failure.reason
        raise
    finally:
        span.end(error, {"loraserve.revision": log.revision or ""})
