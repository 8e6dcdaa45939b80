"""Random PEFT adapters of very different ranks for one checkpoint, as PEFT writes them."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

MIN_SHIFT = 0.2  # median change of the log-probabilities that an adapter makes, nats
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter. `gain` is the size of what it adds to a linear layer, relative to the layer."""

    name: str
    rank: int
    alpha: int
    modules: str | Sequence[str] = ATTENTION + MLP
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    rslora: bool = False
    storage: str = "float32"
    gain: float = 0.3


# No scaling (alpha/rank, or alpha/sqrt(rank) with rsLoRA) is 1: dropping it must show.
ADAPTERS = {
    spec.name: spec
    for spec in (
        AdapterSpec("r1", 1, 2),
        AdapterSpec("r3", 3, 4, ("q_proj", "v_proj"), gain=0.5),
        AdapterSpec("r8", 8, 16, rank_pattern={"q_proj": 5, r"layers.1.mlp.down_proj": 2}),
        AdapterSpec("r16", 16, 8, rslora=True, storage="bfloat16"),
        AdapterSpec(
            *("r17", 17, 34),
            alpha_pattern={r"layers\.0\.self_attn\.o_proj": 40, "gate_proj": 9},
        ),
        AdapterSpec("r64", 64, 16, MLP, storage="float16"),
        AdapterSpec(
            *("r100", 100, 30),
            rank_pattern={r"layers\.[01]\.self_attn\.[kv]_proj": 33, "up_proj": 7},
            alpha_pattern={"k_proj": 11},
            rslora=True,
        ),
        AdapterSpec("r128", 128, 256, ("k_proj", "o_proj", "gate_proj", "down_proj")),
    )
}


def _lora_config(spec: AdapterSpec) -> LoraConfig:
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=spec.modules if isinstance(spec.modules, str) else list(spec.modules),
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        use_rslora=spec.rslora,
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def _randomise(model: PeftModel, spec: AdapterSpec) -> None:
    """Draws A and B of one adapter; values are exact in the dtype it is stored in."""
    generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
    dtype = getattr(torch, spec.storage)
    module: Any
    for module in model.modules():
        if spec.name not in getattr(module, "lora_A", {}):
            continue
        a, b = module.lora_A[spec.name].weight, module.lora_B[spec.name].weight
        rank, inputs = a.shape
        size = spec.gain / (module.scaling[spec.name] * rank**0.5)
        a.copy_((torch.randn(a.shape, generator=generator) * inputs**-0.5).to(dtype))
        b.copy_((torch.randn(b.shape, generator=generator) * size).to(dtype))
        a.data, b.data = a.data.to(dtype), b.data.to(dtype)


def make_adapters(
    checkpoint: Path, directory: Path, specs: Sequence[AdapterSpec]
) -> dict[str, Path]:
    """Writes each adapter into directory/name; the paths by name."""
    model: PeftModel | None = None
    for spec in specs:
        if model is None:
            base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            model = get_peft_model(base, _lora_config(spec), adapter_name=spec.name)
        else:
            model.add_adapter(spec.name, _lora_config(spec))
        _randomise(model, spec)
    assert model is not None
    model.save_pretrained(str(directory))
    return {spec.name: directory / spec.name for spec in specs}


def assert_shift(name: str, base: torch.Tensor, adapted: torch.Tensor) -> None:
    """The adapter moves the log-probabilities [positions, vocab] by MIN_SHIFT in the median."""
    shift = (adapted - base).abs().median().item()
    assert shift >= MIN_SHIFT, f"{name}: moves log-probabilities by only {shift:.3f} in the median"
