"""PEFT directories are read as PEFT itself reads them, or refused."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraserve.checkpoint.adapter_source import MODULES, AdapterSource
from loraserve.checkpoint.peft_adapter import read_arrays, read_peft_directory
from loraserve.errors import InvalidCheckpointError, UnsupportedError

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def save_with_peft(
    directory: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> peft.PeftModel:
    """A random adapter saved by PEFT, and the model that PEFT makes of what it saved."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        **{"target_modules": list(MODULES), "task_type": "CAUSAL_LM"} | options
    )
    model = peft.get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(directory))
    return peft.PeftModel.from_pretrained(
        tiny_llama(), str(directory), autocast_adapter_dtype=False
    )


def lora_layers(model: peft.PeftModel) -> Iterator[tuple[int, str, Any]]:
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            parts = name.split(".")
            yield int(parts[parts.index("layers") + 1]), parts[-1], layer


def as_torch(array: np.ndarray[Any, Any], dtype: str) -> torch.Tensor:
    copied = torch.from_numpy(array.astype(np.int16) if dtype == "BF16" else array.copy())
    return copied.view(torch.bfloat16) if dtype == "BF16" else copied


def assert_as_peft(source: AdapterSource, model: peft.PeftModel) -> None:
    ours = {(m.layer, m.module): m for m in source.modules}
    theirs = {(layer, module): lora for layer, module, lora in lora_layers(model)}
    assert ours.keys() == theirs.keys()
    assert ours
    for key, lora in theirs.items():
        module = ours[key]
        assert module.rank == lora.r["default"]
        assert module.scaling == lora.scaling["default"]  # bitwise: the same float64
        assert torch.equal(as_torch(module.a, module.dtype), lora.lora_A["default"].weight)
        assert torch.equal(as_torch(module.b, module.dtype), lora.lora_B["default"].weight)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 8, "lora_alpha": 16},
        {"r": 3, "lora_alpha": 7, "use_rslora": True},
        {"r": 1, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9}},
        {
            "r": 4,
            "rank_pattern": {"k_proj": 3, r"model\.layers\.(1|1[01])\.self_attn\.[kv]_proj": 7},
            "alpha_pattern": {r"layers\.[0-9]\.mlp\..*": 5, "^model.layers.10.mlp.up_proj": 11},
        },
        # Whole name parts: "1.mlp.up_proj" is not of layer 11. The first match wins; PEFT sorts the
        # keys when it saves, so only patterns that are in that order survive saving.
        {"rank_pattern": {"1.mlp.up_proj": 6, "[qkv]_proj": 7, "up_proj": 5, "v_proj": 9}},
        {"alpha_pattern": {"[qk]_proj|up_proj": 3.5, r"\w+_proj": 1}, "use_rslora": True},
        {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(v|up)_proj"},
        {
            "target_modules": "all-linear",
            "exclude_modules": ["k_proj", "model.layers.3.mlp.up_proj"],
        },
        {"exclude_modules": r".*\.mlp\..*"},
        {"layers_to_transform": [1, 11], "layers_pattern": "layers"},
        {"layers_to_transform": 2, "target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"]},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"r": 4, "lora_dropout": 0.5, "init_lora_weights": "gaussian"},
    ],
    ids=lambda options: ",".join(options),
)
def test_ranks_scaling_and_weights_are_those_of_peft(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = save_with_peft(tmp_path, **options)
    assert_as_peft(read_peft_directory(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_source_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_with_peft(tmp_path, dtype, r=5)
    source = read_peft_directory(tmp_path)
    expected = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert {m.dtype for m in source.modules} == {expected}
    assert_as_peft(source, model)
    # The same tensors handed over in memory, in both spellings.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert_as_peft(read_arrays(tensors, config), model)
    spelled = {re.sub("(lora_.)", r"\1.default", name): t for name, t in tensors.items()}
    assert_as_peft(read_arrays(spelled, model.peft_config["default"].to_dict()), model)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    shapes = {"A": (2, 6), "B": (4, 2)}
    save_file(
        {f"{Q_PROJ}.lora_{side}.weight": torch.ones(shape) for side, shape in shapes.items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "base_model_name_or_path": "org/base"}')
    return tmp_path


def test_a_directory_is_read(directory: Path) -> None:
    source = read_peft_directory(directory)
    assert (source.base_name, len(source.modules)) == ("org/base", 1)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"r": 2, "r": 2}', '{"r": NaN}', "\xff", "[" * 99]
)
def test_broken_config_files_are_refused(directory: Path, text: str) -> None:
    (directory / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidCheckpointError, match=r"^adapter_config\.json: "):
        read_peft_directory(directory)


def test_a_huge_config_file_is_refused(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"r": 2}' + " " * (1 << 20))
    with pytest.raises(InvalidCheckpointError, match="the limit is 1048576"):
        read_peft_directory(directory)


def test_missing_files_and_pickles_are_refused(directory: Path) -> None:
    weights = directory / "adapter_model.safetensors"
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match=r"^adapter_model\.bin: is a pickle"):
        read_peft_directory(directory)
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(InvalidCheckpointError, match=r"^adapter_model\.safetensors: is missing"):
        read_peft_directory(directory)
    (directory / "adapter_config.json").unlink()
    with pytest.raises(InvalidCheckpointError, match=r"^adapter_config\.json: is missing"):
        read_peft_directory(directory)


def test_an_empty_or_truncated_weights_file_is_refused(directory: Path) -> None:
    weights = directory / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(InvalidCheckpointError, match=r"^adapter_model\.safetensors"):
        read_peft_directory(directory)
    weights.write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(InvalidCheckpointError, match="holds no tensors"):
        read_peft_directory(directory)
