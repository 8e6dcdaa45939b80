"""Small random checkpoints of every family, in odd shapes, as Hugging Face directories.

Weights are drawn so that a wrong model cannot look right: log-probabilities spread over the
vocabulary, attention is peaked, and norms and biases are far from one and zero.
"""

import copy
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

CONTEXT = 512  # max_position_embeddings of every checkpoint, tokens
MIN_SPREAD = 1.5  # standard deviation of the log-probabilities over the vocabulary, nats
MAX_NOISE = 5e-5  # of the oracle's own float32 arithmetic, nats


@dataclass(frozen=True)
class CheckpointSpec:
    """One random checkpoint; sizes in elements.

    `storage` is the dtype in the files. `legacy_config` writes config.json as transformers 4 did
    (rope_theta, rope_scaling and torch_dtype at the top level, no head_dim where it follows from
    the hidden size).
    """

    name: str
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    sliding_window: int | None = None
    storage: str = "float32"
    legacy_config: bool = False
    max_shard_size: str = "1GB"


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that all three frequency bands occur within a prompt of 300 tokens.
    "original_max_position_embeddings": 64,
}

# Name, type, hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, tied. GQA ratios
# 1, 2, 4 and 8; the vocabulary is never a multiple of anything a kernel would like.
SPECS = {
    spec.name: spec
    for spec in (
        CheckpointSpec("llama", "llama", 64, 2, 8, 1, 16, 112, 211, False, max_shard_size="100KB"),
        CheckpointSpec(
            *("llama-rope3", "llama", 96, 2, 4, 4, 24, 200, 1009, True, 500000.0, LLAMA3_ROPE),
            legacy_config=True,
        ),
        CheckpointSpec(
            *("llama-linear", "llama", 48, 3, 6, 3, 16, 90, 257, False, 10000.0),
            rope_scaling={"rope_type": "linear", "factor": 4.0},
        ),
        CheckpointSpec(
            *("mistral", "mistral", 80, 2, 4, 1, 80, 136, 499, False, 10000.0),
            sliding_window=21,
        ),
        CheckpointSpec(
            *("qwen2", "qwen2", 112, 2, 4, 2, 28, 152, 1009, True, 1000000.0),
            legacy_config=True,
        ),
        CheckpointSpec("qwen3", "qwen3", 128, 2, 8, 2, 128, 144, 211, False, 1000000.0),
        CheckpointSpec("qwen3-bf16", "qwen3", 72, 3, 4, 1, 32, 100, 307, True, storage="bfloat16"),
        CheckpointSpec("llama-f16", "llama", 64, 2, 2, 1, 64, 96, 211, False, storage="float16"),
    )
}


def _config(spec: CheckpointSpec) -> Any:
    options: dict[str, Any] = {
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "intermediate_size": spec.intermediate,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            **spec.rope_scaling,
            "rope_theta": spec.rope_theta,
        },
    }
    if spec.model_type == "qwen2":  # has no head_dim of its own
        assert spec.head_dim * spec.heads == spec.hidden
    else:
        options["head_dim"] = spec.head_dim
    if spec.model_type == "mistral":
        options["sliding_window"] = spec.sliding_window
    return AutoConfig.for_model(spec.model_type, **options)


@torch.no_grad()
def _randomise(model: torch.nn.Module, spec: CheckpointSpec) -> None:
    """Draws every parameter; norms and biases are exact in bf16.

    A bf16 engine may keep norms and biases in either dtype: this way both are the same numbers.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            value = 1.4 + 0.3 * value
        elif "norm" in name:
            value = 1.0 + 0.2 * value
        elif name.endswith(".bias"):
            value = 0.5 * value
        elif "lm_head" in name or (spec.tied and "embed_tokens" in name):
            value *= 2.1 / spec.hidden**0.5
        elif "q_proj" in name or "k_proj" in name:
            value *= 1.4 / spec.hidden**0.5  # attention logits of standard deviation 2
        elif "embed_tokens" not in name:
            value *= parameter.shape[-1] ** -0.5
        if parameter.dim() == 1:
            value = value.bfloat16().float()
        parameter.copy_(value)


def _write_legacy_config(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if config.get("head_dim", 0) * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]
    path.write_text(json.dumps(config, indent=2))


@torch.no_grad()
def assert_useful(model: torch.nn.Module, spec: CheckpointSpec) -> None:
    """The oracle can tell right from wrong: it spreads, and float32 noise is far below 1e-4.

    Each position's log-probabilities have a standard deviation of at least MIN_SPREAD, and differ
    from those computed in float64 by at most MAX_NOISE.
    """
    ids = torch.randint(spec.vocab, (1, 300), generator=torch.Generator().manual_seed(0))
    single = model(ids).logits[0].log_softmax(-1)
    exact = copy.deepcopy(model).double()(ids).logits[0].log_softmax(-1)
    spread = single.std(-1).min().item()
    assert spread >= MIN_SPREAD, f"{spec.name}: log-probabilities spread only {spread:.2f}"
    noise = (single - exact).abs().max().item()
    assert noise <= MAX_NOISE, f"{spec.name}: float32 alone is off by {noise:.1e}"


def make_checkpoint(spec: CheckpointSpec, directory: Path) -> Path:
    """Writes the checkpoint into `directory` and returns it. The same spec, the same bytes."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(_config(spec), dtype=torch.float32).eval()
    _randomise(model, spec)
    assert_useful(model, spec)
    model.to(getattr(torch, spec.storage)).save_pretrained(
        directory, max_shard_size=spec.max_shard_size
    )
    if spec.legacy_config:
        _write_legacy_config(directory / "config.json")
    return directory
