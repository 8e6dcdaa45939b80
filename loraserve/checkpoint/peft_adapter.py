"""PEFT LoRA adapters: a directory as `save_pretrained` writes it, or arrays in memory."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve.checkpoint.adapter_source import (
    ATTENTION_MODULES,
    MAX_FEATURES,
    MAX_LAYERS,
    MAX_RANK,
    MODULES,
    AdapterModule,
    AdapterSource,
    check_finite,
)
from loraserve.checkpoint.bounded_json import parse_object
from loraserve.checkpoint.dlpack_view import float_view
from loraserve.checkpoint.peft_config import LoraConfigRules
from loraserve.checkpoint.safetensors_file import open_safetensors
from loraserve.errors import InvalidCheckpointError, UnsupportedError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MAX_CONFIG_BYTES = 1 << 20

_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>0|[1-9][0-9]{0,3})"
    r"\.(?P<block>self_attn|mlp)\.(?P<linear>[a-z]+_proj))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)

# dtype ("F32", "F16", "BF16") and values
_Matrix = tuple[str, npt.NDArray[Any]]


def _group(tensors: Mapping[str, _Matrix]) -> dict[tuple[int, str], dict[str, str]]:
    """(layer, module) to {"A": tensor name, "B": tensor name}, in canonical order."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    for name in tensors:
        match = _TENSOR_NAME.fullmatch(name)
        block = match and ("self_attn" if match["linear"] in ATTENTION_MODULES else "mlp")
        if match is None or match["linear"] not in MODULES or match["block"] != block:
            raise UnsupportedError(
                f"tensor {name!r}",
                f"is not lora_A or lora_B of {', '.join(MODULES)} in a decoder layer",
            )
        layer = int(match["layer"])
        if layer >= MAX_LAYERS:
            raise UnsupportedError(f"tensor {name!r}", f"layer {layer}, the limit is {MAX_LAYERS}")
        pair = found.setdefault((layer, match["linear"]), {})
        if match["side"] in pair:
            raise InvalidCheckpointError(f"tensor {name!r}", f"is {pair[match['side']]!r} again")
        pair[match["side"]] = name
    return dict(sorted(found.items(), key=lambda item: (item[0][0], MODULES.index(item[0][1]))))


def _check_shape(name: str, array: npt.NDArray[Any], rank_axis: int, rank: int) -> None:
    field = f"tensor {name!r}"
    if array.ndim != 2:
        raise InvalidCheckpointError(field, f"{array.ndim} dimensions, expected 2")
    if array.shape[rank_axis] > MAX_RANK:
        raise InvalidCheckpointError(
            field, f"rank {array.shape[rank_axis]}, the limit is {MAX_RANK}"
        )
    if array.shape[rank_axis] != rank:
        raise InvalidCheckpointError(
            field, f"rank {array.shape[rank_axis]}, but the configuration says r = {rank}"
        )
    if not 1 <= array.shape[1 - rank_axis] <= MAX_FEATURES:
        raise InvalidCheckpointError(
            field, f"{array.shape[1 - rank_axis]} features, not within 1 and {MAX_FEATURES}"
        )


def _module(
    layer: int,
    module: str,
    pair: Mapping[str, str],
    tensors: Mapping[str, _Matrix],
    rules: LoraConfigRules,
    finite: bool,
) -> AdapterModule:
    for side in "AB":
        if side not in pair:
            (other,) = pair.values()
            raise InvalidCheckpointError(f"tensor {other!r}", f"has no lora_{side} beside it")
    block = "self_attn" if module in ATTENTION_MODULES else "mlp"
    name = f"model.layers.{layer}.{block}.{module}"
    if not rules.targets(layer, name):
        # PEFT drops such a tensor without a word.
        raise InvalidCheckpointError(
            f"tensor {pair['A']!r}", "the configuration does not put LoRA on this module"
        )
    rank, scaling = rules.rank_and_scaling(name)
    (dtype, a), (dtype_b, b) = tensors[pair["A"]], tensors[pair["B"]]
    _check_shape(pair["A"], a, 0, rank)
    _check_shape(pair["B"], b, 1, rank)
    if dtype != dtype_b:
        raise UnsupportedError(f"tensor {pair['B']!r}", f"{dtype_b}, but its lora_A is {dtype}")
    if finite:
        check_finite(f"tensor {pair['A']!r}", a, dtype)
        check_finite(f"tensor {pair['B']!r}", b, dtype)
    return AdapterModule(
        layer, module, rank, scaling, dtype, np.ascontiguousarray(a), np.ascontiguousarray(b)
    )


def _source(
    tensors: Mapping[str, _Matrix], config: Mapping[str, Any], finite: bool = True
) -> AdapterSource:
    rules = LoraConfigRules(config)
    if not tensors:
        raise InvalidCheckpointError(WEIGHTS_NAME, "holds no tensors")
    return AdapterSource(
        rules.base_name,
        tuple(
            _module(layer, module, pair, tensors, rules, finite)
            for (layer, module), pair in _group(tensors).items()
        ),
    )


def read_arrays(arrays: Mapping[str, Any], config: Mapping[str, Any]) -> AdapterSource:
    """An adapter from arrays in memory, views where they are contiguous.

    `arrays`: PEFT tensor names (as in `adapter_model.safetensors`; `lora_A.default.weight` too) to
    float32, float16 or bfloat16 arrays, see `float_view`. `config`: the fields of
    `adapter_config.json`; absent ones have PEFT's defaults. Raises InvalidCheckpointError or
    UnsupportedError, naming the field or tensor.
    """
    return _source(
        {str(name): float_view(f"tensor {name!r}", array) for name, array in arrays.items()},
        config,
    )


def peft_files(path: Path) -> tuple[Path, Path]:
    """Configuration and weights of a PEFT directory. Raises InvalidCheckpointError where one is
    missing, UnsupportedError for weights as a pickle."""
    config, weights = path / CONFIG_NAME, path / WEIGHTS_NAME
    if not config.is_file():
        raise InvalidCheckpointError(CONFIG_NAME, "is missing; not a PEFT directory")
    if not weights.is_file():
        if (path / PICKLE_NAME).is_file():
            raise UnsupportedError(
                PICKLE_NAME, f"is a pickle, which can run code; save it as {WEIGHTS_NAME}"
            )
        raise InvalidCheckpointError(WEIGHTS_NAME, "is missing")
    return config, weights


def read_peft_directory(path: Path, *, finite: bool = True) -> AdapterSource:
    """The adapter in a PEFT directory; its matrices are views of the mapped file.

    `finite`: looks at every weight, and refuses NaN and infinite ones. Raises
    InvalidCheckpointError or UnsupportedError, naming the field, file or tensor.
    """
    config_path, weights_path = peft_files(path)
    with config_path.open("rb") as file:
        # One byte more than allowed, so that the limit is noticed without reading everything.
        raw = file.read(MAX_CONFIG_BYTES + 1)
    config = parse_object(CONFIG_NAME, raw, MAX_CONFIG_BYTES)
    views = open_safetensors(weights_path)
    tensors = {name: (view.dtype, view.data) for name, view in views.items()}
    return _source(tensors, config, finite)
