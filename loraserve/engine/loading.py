"""From a checkpoint's mapped tensors to the C++ engine's views of them."""

import contextlib
from collections.abc import Iterator, Set
from dataclasses import fields
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


def _readable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Contiguous and aligned, as C++ reads it; a copy only where the file left it unaligned."""
    return np.require(array, requirements=["C_CONTIGUOUS", "ALIGNED"])


@contextlib.contextmanager
def engine_weights(weights: ModelWeights) -> Iterator[_engine.ModelWeights]:
    """The checkpoint's tensors as C++ sees them: views that are valid inside the block.

    Raises InvalidCheckpointError naming a tensor that holds NaN or infinity.
    """
    kept: list[npt.NDArray[Any]] = []  # C++ has addresses only

    def matrix(view: TensorView | None) -> _engine.HostMatrix | None:
        if view is None:
            return None
        check_finite(f"tensor {view.name!r}", view.data, view.dtype)
        kept.append(_readable(view.data))
        return _engine.HostMatrix(kept[-1])

    out = _engine.ModelWeights()
    for name in ("embed_tokens", "final_norm", "lm_head"):
        setattr(out, name, matrix(getattr(weights, name)))
    for layer in weights.layers:
        to = _engine.LayerWeights()
        for role in fields(layer):
            setattr(to, role.name, matrix(getattr(layer, role.name)))
        out.add_layer(to)
    yield out


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
