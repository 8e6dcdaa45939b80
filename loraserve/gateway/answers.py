"""The answers of one HTTP request: one for each choice, from the cluster."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from loraserve.client import AnswerStream, AsyncClient, Chunk, Completion, Prompt
from loraserve.gateway.record import RequestRecord
from loraserve.gateway.sampling import of_choice
from loraserve.sampling_params import SamplingParams

# Of one HTTP request; the others wait, so that a long list does not fill a node by itself.
MAX_AT_ONCE = 64
# Chunks that wait for a client which reads several answers on one stream.
_WAITING_CHUNKS = 256


@dataclass(frozen=True)
class Choice:
    """One answer that is wanted."""

    index: int
    prompt: Prompt
    params: SamplingParams
    base: str
    adapter: str | None
    only_prompt: bool = False
    """What is drawn is not wanted: one token is the least that nodes draw."""

    def stream(self, client: AsyncClient, record: RequestRecord) -> AnswerStream:
        return client.stream(
            self.prompt,
            self.params,
            adapter=self.adapter,
            base=self.base,
            request_id=f"{record.id}-{self.index}",
            span=record.span,
        )


_T = TypeVar("_T", Chunk, Completion)


def _without_answer(piece: _T) -> _T:
    return replace(
        piece,
        token_ids=[],
        text="",
        logprobs=[],
        top_logprobs=[],
        finish_reason="length",
        stop_reason=None,
    )


def choices(
    prompts: Sequence[Prompt],
    n: int,
    params: SamplingParams,
    base: str,
    adapter: str | None,
    *,
    only_prompt: bool = False,
) -> list[Choice]:
    """In OpenAI's order: all answers to the first prompt come first."""
    return [
        Choice(i * n + j, prompt, of_choice(params, j), base, adapter, only_prompt)
        for i, prompt in enumerate(prompts)
        for j in range(n)
    ]


async def _together(tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Returns when all have ended; the first error ends the others."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def whole(
    client: AsyncClient, wanted: Sequence[Choice], record: RequestRecord
) -> list[Completion]:
    """All answers, in order. Raises LoraServeError: the first one's that failed."""
    found: list[Completion | None] = [None] * len(wanted)
    room = asyncio.Semaphore(MAX_AT_ONCE)

    async def one(place: int, choice: Choice) -> None:
        async with room:
            with record.answer(choice.adapter) as watch:
                async with choice.stream(client, record) as stream:
                    async for chunk in stream:
                        watch.chunk(chunk)
                    completion = stream.completion()
                watch.completed(completion)
            found[place] = _without_answer(completion) if choice.only_prompt else completion

    if len(wanted) == 1:
        await one(0, wanted[0])
    else:
        await _together([asyncio.create_task(one(i, c)) for i, c in enumerate(wanted)])
    return [completion for completion in found if completion is not None]


@dataclass(slots=True)
class Piece:
    """What came of one choice. `completion` is set with its last piece."""

    index: int
    chunk: Chunk
    prompt_tokens: int
    completion: Completion | None = None


async def _pieces_of(
    client: AsyncClient, choice: Choice, record: RequestRecord
) -> AsyncGenerator[Piece, None]:
    with record.answer(choice.adapter) as watch:
        async with choice.stream(client, record) as stream:
            async for chunk in stream:
                watch.chunk(chunk)
                completion = None
                if chunk.finish_reason is not None:
                    completion = stream.completion()
                    watch.completed(completion)
                if choice.only_prompt:
                    chunk = _without_answer(chunk)
                    completion = _without_answer(completion) if completion else None
                yield Piece(choice.index, chunk, stream.prompt_tokens, completion)


async def pieces(
    client: AsyncClient, wanted: Sequence[Choice], record: RequestRecord
) -> AsyncGenerator[Piece, None]:
    """As they come, those of one choice in order. Leaving it cancels what still runs."""
    if len(wanted) == 1:
        async with contextlib.aclosing(_pieces_of(client, wanted[0], record)) as found:
            async for piece in found:
                yield piece
        return
    queue: asyncio.Queue[Piece | None] = asyncio.Queue(_WAITING_CHUNKS)
    room = asyncio.Semaphore(MAX_AT_ONCE)

    async def one(choice: Choice) -> None:
        async with room, contextlib.aclosing(_pieces_of(client, choice, record)) as found:
            async for piece in found:
                await queue.put(piece)

    async def every() -> None:
        try:
            await _together([asyncio.create_task(one(choice)) for choice in wanted])
        finally:
            # Nobody reads it where this was cancelled.
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)

    running = asyncio.create_task(every())
    try:
        while (taken := await _next(queue, running)) is not None:
            yield taken
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _next(
    queue: "asyncio.Queue[Piece | None]", running: "asyncio.Task[None]"
) -> Piece | None:
    # A full queue has no place for the end: then the task's end tells.
    if queue.empty() and running.done():
        return None
    return await queue.get()
