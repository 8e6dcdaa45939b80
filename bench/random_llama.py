"""Random Llamas in bfloat16 with PEFT adapters, written straight to disk, for speed tables.

The tokenizer is byte-fallback BPE without merges: nothing is tokenized here, but llama.cpp's
converter wants one that it knows the kind of.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANKS = (8, 16, 32, 64, 128, 8, 16, 128)
VOCAB = 32000


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Module path within a layer to (out, in)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def step_bytes(self) -> int:
        """Of bfloat16 weights that one decode step reads: the layers and the output matrix."""
        layer = sum(out * into for out, into in self.linears().values())
        return 2 * (layer * self.layers + VOCAB * self.hidden)


SHAPES = {
    "tiny": Shape(256, 4, 8, 4, 688),
    "120m": Shape(768, 12, 12, 4, 2048),
    "1b": Shape(2048, 22, 32, 4, 5632),
}


def _tensor(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16)


def _write_tokenizer(directory: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [f"\u2581t{index}" for index in range(VOCAB - len(pieces))]
    special = [
        {"id": index, "content": pieces[index], "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for index in range(3)
    ]  # fmt: skip
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": [],
        },
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _write_base(directory: Path, shape: Shape, generator: torch.Generator) -> None:
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.embed_tokens.weight": _tensor(VOCAB, shape.hidden, generator),
        "lm_head.weight": _tensor(VOCAB, shape.hidden, generator),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name, (out, into) in shape.linears().items():
            tensors[f"{prefix}{name}.weight"] = _tensor(out, into, generator)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(directory)


def _write_adapter(directory: Path, shape: Shape, rank: int, generator: torch.Generator) -> None:
    directory.mkdir(parents=True)
    modules = sorted(name.rpartition(".")[2] for name in shape.linears())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(shape.layers):
        for name, (out, into) in shape.linears().items():
            prefix = f"base_model.model.model.layers.{layer}.{name}."
            tensors[f"{prefix}lora_A.weight"] = _tensor(rank, into, generator)
            tensors[f"{prefix}lora_B.weight"] = _tensor(out, rank, generator)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def make_checkpoint(root: Path, size: str) -> tuple[Path, list[Path]]:
    """The base directory and one adapter directory for each of RANKS; kept if they are there."""
    shape = SHAPES[size]
    base = root / "base"
    adapters = [root / f"a{index}_r{rank}" for index, rank in enumerate(RANKS)]
    if not (root / "complete").exists():
        generator = torch.Generator().manual_seed(0)
        _write_base(base, shape, generator)
        for directory, rank in zip(adapters, RANKS, strict=True):
            _write_adapter(directory, shape, rank, generator)
        (root / "complete").touch()
    return base, adapters


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: random_llama.py {'|'.join(SHAPES)} DIR: writes DIR/base and DIR/a*")
    print(make_checkpoint(Path(sys.argv[2]), sys.argv[1])[0])
