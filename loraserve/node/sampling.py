"""Sampling parameters from the wire. Absent fields take the default; ranges of values that only
the engine knows (token ids, numbers of entries) are left to it."""

import math
import random

from loraserve.errors import InvalidArgumentError
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import common_pb2

_INT32_MAX = 2**31 - 1
_COUNTS = ("max_tokens", "min_tokens", "top_k", "logprobs")
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_PENALTY_LIMIT = 2.0


def _present(message: common_pb2.SamplingParams) -> dict[str, float | int]:
    values: dict[str, float | int] = {}
    for name in _COUNTS + _NUMBERS:
        if message.HasField(name):  # type: ignore[arg-type]
            values[name] = getattr(message, name)
    for name in _COUNTS:
        if values.get(name, 0) > _INT32_MAX:
            raise InvalidArgumentError(name, f"{values[name]} is over {_INT32_MAX}")
    for name in _NUMBERS:
        if not math.isfinite(values.get(name, 0)):
            raise InvalidArgumentError(name, f"{values[name]} is not a finite number")
    for name in ("presence_penalty", "frequency_penalty"):
        if abs(values.get(name, 0)) > _PENALTY_LIMIT:
            raise InvalidArgumentError(name, f"{values[name]} is not in [-2, 2]")
    return values


def sampling_from_wire(message: common_pb2.SamplingParams, start_index: int) -> SamplingParams:
    """What the engine is to draw of an answer whose first `start_index` tokens are there.

    The seed is always set. Raises InvalidArgumentError.
    """
    values = _present(message)
    max_tokens = int(values.pop("max_tokens", SamplingParams.max_tokens))
    if max_tokens < 1:
        raise InvalidArgumentError("max_tokens", "must be at least 1")
    if start_index >= max_tokens:
        raise InvalidArgumentError(
            "start_index", f"{start_index}: the answer of {max_tokens} tokens has ended"
        )
    if message.prompt_logprobs and start_index:
        raise InvalidArgumentError("prompt_logprobs", "came with the first token, which is there")
    # Of the whole answer, for the engine too: it counts the tokens that are there.
    min_tokens = int(values.pop("min_tokens", 0))
    if min_tokens > max_tokens:
        raise InvalidArgumentError("min_tokens", f"{min_tokens} is over max_tokens {max_tokens}")
    return SamplingParams(
        max_tokens=max_tokens - start_index,
        min_tokens=min_tokens,
        logit_bias=dict(message.logit_bias),
        seed=message.seed if message.HasField("seed") else random.getrandbits(64),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        prompt_logprobs=message.prompt_logprobs,
        **values,  # type: ignore[arg-type]
    )
