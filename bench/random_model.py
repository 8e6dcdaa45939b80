"""A random model and adapters of any size, for measurements that need no particular weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from loraserve.checkpoint.adapter_source import MODULES, AdapterModule, AdapterSource


@dataclass(frozen=True)
class Shape:
    """Of a Llama model. The default has 120 million weights."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 4
    intermediate: int = 2048
    vocabulary: int = 16000
    context: int = 4096
    head_dim: int = 64

    def modules(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear modules of a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


def write_model(shape: Shape, directory: Path, seed: int = 0) -> None:
    """A Hugging Face directory of random float32 weights."""
    rng = np.random.default_rng(seed)

    def weights(*size: int) -> npt.NDArray[Any]:
        return rng.standard_normal(size, np.float32) * 0.02

    tensors = {
        "model.embed_tokens.weight": weights(shape.vocabulary, shape.hidden),
        "model.norm.weight": np.ones(shape.hidden, np.float32),
        "lm_head.weight": weights(shape.vocabulary, shape.hidden),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(shape.hidden, np.float32)
        for name, (inputs, outputs) in shape.modules().items():
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            tensors[f"{prefix}{part}.{name}.weight"] = weights(outputs, inputs)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    write_config(shape, directory, "float32")


def write_config(shape: Shape, directory: Path, dtype: str) -> None:
    """The model's config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))


def random_adapter(shape: Shape, mib: float, seed: int = 0) -> AdapterSource:
    """Of all seven modules in float32, of the rank that comes closest to the size."""
    per_rank = 4 * shape.layers * sum(i + o for i, o in shape.modules().values())
    rank = max(1, min(512, round(mib * 2**20 / per_rank)))
    rng = np.random.default_rng(seed)

    def weights(*size: int) -> npt.NDArray[Any]:
        return rng.standard_normal(size, np.float32) * 0.01

    return AdapterSource(
        None,
        tuple(
            AdapterModule(layer, name, rank, 1.0, "F32", weights(rank, i), weights(o, rank))
            for layer in range(shape.layers)
            for name in MODULES
            for i, o in [shape.modules()[name]]
        ),
    )
