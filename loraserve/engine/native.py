"""Fills the C++ engine's structs, so that a value of the wrong kind is an error with a name."""

import random
from collections.abc import Mapping
from typing import Any

from loraserve import _engine
from loraserve.engine.config import EngineConfig
from loraserve.errors import InvalidArgumentError
from loraserve.sampling_params import SamplingParams

DEFAULT_MEMORY_BYTES = 1 << 30


def assign(native: Any, name: str, value: Any, field: str | None = None) -> None:
    """native.name = value. Raises InvalidArgumentError where C++ cannot hold the value."""
    try:
        setattr(native, name, value)
    except (TypeError, ValueError, OverflowError):
        kind = type(getattr(native, name)).__name__
        raise InvalidArgumentError(
            field or name, f"{value!r} is not a {kind} in the range of the field"
        ) from None


def native_config(config: EngineConfig, weight_dtype: str) -> _engine.EngineConfig:
    """`weight_dtype` is what "auto" came to."""
    native = _engine.EngineConfig()
    for name in (
        "device",
        "threads",
        "isa",
        "block_size",
        "page_bytes",
        "max_batch_tokens",
        "max_sequences",
        "max_step_adapter_bytes",
        "prefix_cache",
        "prefetch",
        "record_steps",
    ):
        assign(native, name, getattr(config, name))
    memory = DEFAULT_MEMORY_BYTES if config.memory_bytes is None else config.memory_bytes
    assign(native, "memory_bytes", memory)
    dtypes = {
        "weight_dtype": weight_dtype,
        "adapter_dtype": config.adapter_dtype,
        "activation_dtype": config.activation_dtype,
    }
    for field, dtype in dtypes.items():
        if dtype not in ("auto", "float32", "bfloat16"):
            raise InvalidArgumentError(field, f"{dtype!r} is not auto, float32 or bfloat16")
    activation = config.activation_dtype
    if config.device == "cpu" and (activation, weight_dtype) == ("bfloat16", "float32"):
        raise InvalidArgumentError(
            "activation_dtype", "bfloat16 needs weights in bfloat16, weight_dtype is float32"
        )
    native.set_dtypes(
        weight_dtype,
        None if config.adapter_dtype == "auto" else config.adapter_dtype,
        None if activation == "auto" else activation,
    )
    return native


def native_params(params: SamplingParams, end_ids: frozenset[int]) -> _engine.SamplingParams:
    """`end_ids` are all tokens that end the answer. Ranges are the engine's to check."""
    native = _engine.SamplingParams()
    for name in (
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "prompt_logprobs",
    ):
        assign(native, name, getattr(params, name))
    if params.seed is not None and not isinstance(params.seed, int):
        raise InvalidArgumentError("seed", f"{params.seed!r} is not an integer")
    seed = random.getrandbits(63) if params.seed is None else params.seed
    native.seed = seed % 2**64
    if params.logit_bias and not isinstance(params.logit_bias, Mapping):
        raise InvalidArgumentError("logit_bias", "is not a mapping of token ids to numbers")
    assign(native, "logit_bias", list(params.logit_bias.items()) if params.logit_bias else [])
    assign(native, "stop_token_ids", sorted(end_ids))
    if params.logprobs == -1:  # the engine's own word for none
        raise InvalidArgumentError("logprobs", "-1, must not be negative")
    assign(native, "logprobs", -1 if params.logprobs is None else params.logprobs)
    return native
