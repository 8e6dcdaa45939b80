"""From a checkpoint's mapped tensors to the C++ engine's views of them."""

from collections.abc import Set
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve import _engine
from loraserve.checkpoint.adapter_source import check_finite
from loraserve.checkpoint.model_config import ModelConfig, inverse_frequencies
from loraserve.checkpoint.model_weights import ModelWeights
from loraserve.checkpoint.packed_adapter import PackedAdapter
from loraserve.checkpoint.safetensors_file import TensorView

AdapterModuleTuple = tuple[int, str, int, float, npt.NDArray[Any], npt.NDArray[Any]]


def engine_model_config(config: ModelConfig) -> _engine.ModelConfig:
    """The same shape for C++; rope scaling is in the frequencies, windows are by layer."""
    out = _engine.ModelConfig()
    out.vocab_size = config.vocab_size
    out.hidden_size = config.hidden_size
    out.num_layers = config.num_layers
    out.num_heads = config.num_heads
    out.num_kv_heads = config.num_kv_heads
    out.head_dim = config.head_dim
    out.intermediate_size = config.intermediate_size
    out.max_position = config.max_position
    out.rms_norm_eps = config.rms_norm_eps
    out.inverse_frequencies = [float(f) for f in inverse_frequencies(config)]
    out.windows = [window or 0 for window in config.layer_windows]
    return out


def _matrix(view: TensorView) -> _engine.HostMatrix:
    check_finite(f"tensor {view.name!r}", view.data, view.dtype)
    return _engine.HostMatrix(_readable(view.data))


def _readable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Contiguous and aligned, as C++ reads it; a copy only where the file left it unaligned."""
    return np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED"])


def _optional(view: TensorView | None) -> _engine.HostMatrix | None:
    return None if view is None else _matrix(view)


def engine_weights(weights: ModelWeights) -> _engine.ModelWeights:
    """Views only: `weights` must live until the engine is built.

    Raises InvalidCheckpointError naming a tensor that holds NaN or infinity.
    """
    out = _engine.ModelWeights()
    out.embed_tokens = _matrix(weights.embed_tokens)
    out.final_norm = _matrix(weights.final_norm)
    out.lm_head = _optional(weights.lm_head)
    for layer in weights.layers:
        to = _engine.LayerWeights()
        for name in ("input_norm", "post_norm", "q", "k", "v", "o", "gate", "up", "down"):
            setattr(to, name, _matrix(getattr(layer, name)))
        for name in ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm"):
            setattr(to, name, _optional(getattr(layer, name)))
        out.add_layer(to)
    return out


def weight_dtype(choice: str, weights: ModelWeights) -> str:
    """The dtype weights are kept in: "auto" follows the checkpoint."""
    if choice != "auto":
        return choice
    return "bfloat16" if weights.embed_tokens.dtype == "BF16" else "float32"


def adapter_modules(adapter: PackedAdapter) -> list[AdapterModuleTuple]:
    """(layer, module, rank, scaling, A [rank, in], B transposed [rank, out]) of each module."""
    return [
        (m.layer, m.module, m.rank, m.scaling, _readable(m.a), _readable(m.b_transposed))
        for m in adapter.modules
    ]


def installed_dtype(stored: Set[str], choice: str, device: str) -> str:
    """What an adapter stored in these dtypes becomes in pages, in the words of safetensors."""
    if choice != "auto":
        return {"float32": "F32", "bfloat16": "BF16"}[choice]
    return "BF16" if device != "cpu" or stored == {"BF16"} else "F32"
