"""Answers in the making, and what nodes say of them."""

import copy
from typing import Any

import pytest

from loraserve.client.resume import AnswerLog
from loraserve.client.types import Chunk
from loraserve.errors import UnavailableError
from loraserve.sampling_params import SamplingParams
from loraserve.v1.inference_pb2 import (
    GenerateResponse,
    GenerateStart,
    PositionLogprobs,
    TokenLogprob,
)

REVISION = "a" * 64


def begun(**fields: Any) -> GenerateStart:
    about: dict[str, Any] = {
        "revision": REVISION,
        "base": {"name": "tiny", "digest": "d1"},
        "prompt_tokens": 2,
        "cached_prompt_tokens": 1,
        "seed": 77,
        "node_id": "n1",
    }
    return GenerateStart(**(about | fields))


def says(first: int, ids: list[int], text: str | None = None, **fields: Any) -> GenerateResponse:
    text = "".join(f"<{i}>" for i in ids) if text is None else text
    return GenerateResponse(request_id="r", first_index=first, token_ids=ids, text=text, **fields)


def log(max_tokens: int = 8, prompt: Any = (1, 2), **fields: Any) -> AnswerLog:
    params = SamplingParams(max_tokens=max_tokens, **fields.pop("sampling", {}))
    return AnswerLog("r", prompt, params, adapter="sql", **fields)


def taken(made: AnswerLog, *responses: GenerateResponse) -> list[Chunk]:
    chunks = (made.accept(response) for response in responses)
    return [chunk for chunk in chunks if chunk is not None]


def half() -> AnswerLog:
    """An answer of which two tokens are there and the node was lost."""
    made = log()
    taken(made, says(0, [10], start=begun()), says(1, [11]))
    made.request(1, None)
    return made


def refused(made: AnswerLog, response: GenerateResponse, match: str) -> None:
    """The response is refused, and what is here of the answer stays as it is."""
    before = copy.deepcopy(made.completion(1))
    with pytest.raises(UnavailableError, match=match) as caught:
        made.accept(response)
    assert caught.value.field == "stream"
    assert made.completion(1) == before or not made.started


def of_prompt(*values: float) -> list[PositionLogprobs]:
    tops = [[TokenLogprob(token_id=7, logprob=value / 2)] for value in values]
    return [PositionLogprobs(logprob=v, top=t) for v, t in zip(values, tops, strict=True)]
