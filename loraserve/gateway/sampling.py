"""Sampling parameters of a checked body."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loraserve.errors import InvalidArgumentError
from loraserve.sampling_params import SamplingParams

_AS_THEY_ARE = (
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
)


def max_tokens_of(body: Mapping[str, Any], default: int) -> int:
    """Of the answer, by either name. Raises InvalidArgumentError where the two differ."""
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise InvalidArgumentError("max_completion_tokens", f"{new}, but max_tokens is {old}")
    given = old if new is None else new
    return default if given is None else given


def sampling(body: Mapping[str, Any], max_tokens: int, logprobs: int | None) -> SamplingParams:
    """Raises InvalidArgumentError where fields contradict each other."""
    values: dict[str, Any] = {name: body[name] for name in _AS_THEY_ARE if name in body}
    if values.get("min_tokens", 0) > max_tokens:
        raise InvalidArgumentError(
            "min_tokens", f"{values['min_tokens']} is over max_tokens {max_tokens}"
        )
    stop = body.get("stop", ())
    return SamplingParams(
        max_tokens=max_tokens,
        top_k=max(0, body.get("top_k", 0)),
        logit_bias={int(token): bias for token, bias in body.get("logit_bias", {}).items()},
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(body.get("stop_token_ids", ())),
        logprobs=logprobs,
        **values,
    )


def of_choice(params: SamplingParams, index: int) -> SamplingParams:
    """For answer `index` of several: without a seed each draws by its own anyway."""
    if index == 0 or params.seed is None:
        return params
    return replace(params, seed=(params.seed + index) % 2**64)
