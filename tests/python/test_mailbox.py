"""What a coroutine takes of a request's outputs when it comes late."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from hypothesis import given
from hypothesis import strategies as st

from loraserve.engine.assembly import RawOutput
from loraserve.engine.delivery import Mailbox
from loraserve.errors import UnavailableError

T = TypeVar("T")


def output(first_index: int, tokens: list[int], reason: str = "", **more: Any) -> RawOutput:
    fields: dict[str, Any] = {
        "logprobs": [-float(t) for t in tokens],
        "top_logprobs": [{t: -float(t)} for t in tokens],
        "prompt_logprobs": [],
        "prompt_top_logprobs": [],
        "cached_tokens": 3,
        "queue_s": 0.5,
        "error": None,
    }
    fields.update(more)
    return RawOutput(first_index=first_index, token_ids=tokens, finish_reason=reason, **fields)


def taken(items: list[RawOutput], take: Callable[[Mailbox], Awaitable[T]]) -> T:
    async def run() -> T:
        mailbox = Mailbox(asyncio.get_running_loop())
        for item in items:
            mailbox.put(item)
        return await asyncio.wait_for(take(mailbox), 60)

    return asyncio.run(run())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_what_waits_comes_as_one(sizes: list[int]) -> None:
    items, begin = [], 0
    for i, size in enumerate(sizes):
        tokens = list(range(begin, begin + size))
        items.append(output(begin, tokens, "length" if i == len(sizes) - 1 else ""))
        begin += size
    got = taken(items, lambda mailbox: mailbox.aget())
    everything = list(range(begin))
    assert got == output(0, everything, "length")


def test_an_error_comes_after_what_was_before_it() -> None:
    error = UnavailableError("engine", "was closed")
    items = [
        output(0, [7]),
        output(1, [8]),
        output(0, [], "error", error=error),
    ]

    async def both(mailbox: Mailbox) -> tuple[RawOutput, RawOutput]:
        return await mailbox.aget(), await mailbox.aget()

    first, second = taken(items, both)
    assert first.token_ids == [7, 8]
    assert second.error is error


def test_what_comes_later_comes_later() -> None:
    async def two(mailbox: Mailbox) -> tuple[RawOutput, RawOutput]:
        first = await mailbox.aget()
        waiting = asyncio.ensure_future(mailbox.aget())
        await asyncio.sleep(0)
        assert not waiting.done()
        mailbox.put(output(1, [8]))
        return first, await waiting

    first, second = taken([output(0, [7])], two)
    assert (first.token_ids, second.token_ids) == ([7], [8])
