"""Weights by role against the tensors that transformers saved, and broken directories."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from loraserve.checkpoint.model_config import read_model_config
from loraserve.checkpoint.model_weights import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    SINGLE_FILE,
    ModelWeights,
    digest_tensors,
    open_model_weights,
)
from loraserve.checkpoint.safetensors_file import TensorView, open_safetensors
from loraserve.errors import InvalidCheckpointError, LoraServeError, UnsupportedError

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Tensors = dict[str, torch.Tensor]


def _model(path: Path, kind: type[Any] = LlamaConfig, shard: str = "1GB", **options: Any) -> Any:
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(kind(**SIZES, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(path, max_shard_size=shard)
    return model


def _open(path: Path) -> ModelWeights:
    return open_model_weights(path, read_model_config(path))


def _assert_equal(view: TensorView | None, tensor: torch.Tensor) -> None:
    assert view is not None
    assert torch.equal(torch.from_numpy(view.to_float32()), tensor.float())


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LlamaConfig, {"head_dim": 10}),
        (LlamaConfig, {"tie_word_embeddings": True}),
        (Qwen2Config, {}),
        (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    ],
)
def test_every_role_has_its_tensor(
    kind: type[Any], options: dict[str, Any], dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    model = _model(tmp_path, kind, shard, dtype=dtype, **options)
    assert (tmp_path / INDEX_FILE).exists() == (shard == "10KB")
    weights = _open(tmp_path)
    _assert_equal(weights.embed_tokens, model.model.embed_tokens.weight)
    _assert_equal(weights.final_norm, model.model.norm.weight)
    if options.get("tie_word_embeddings"):
        assert weights.lm_head is None
    else:
        _assert_equal(weights.lm_head, model.lm_head.weight)
    assert len(weights.layers) == len(model.model.layers)
    for ours, theirs in zip(weights.layers, model.model.layers, strict=True):
        _assert_equal(ours.input_norm, theirs.input_layernorm.weight)
        _assert_equal(ours.post_norm, theirs.post_attention_layernorm.weight)
        for role in ("q", "k", "v", "o"):
            linear = getattr(theirs.self_attn, f"{role}_proj")
            _assert_equal(getattr(ours, role), linear.weight)
            if linear.bias is not None:
                _assert_equal(getattr(ours, f"{role}_bias"), linear.bias)
        for role in ("gate", "up", "down"):
            _assert_equal(getattr(ours, role), getattr(theirs.mlp, f"{role}_proj").weight)
        assert (ours.q_bias is not None) == (kind is Qwen2Config)
        assert (ours.q_norm is not None) == (kind is Qwen3Config)
        if kind is Qwen3Config:
            _assert_equal(ours.q_norm, theirs.self_attn.q_norm.weight)
            _assert_equal(ours.k_norm, theirs.self_attn.k_norm.weight)


def _edit(path: Path, change: Callable[[Tensors], Any]) -> Path:
    """Changes the tensors of a directory that has one file."""
    tensors = load_file(path / SINGLE_FILE)
    change(tensors)
    save_file(tensors, path / SINGLE_FILE)
    return path


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.norm.weight", lambda t: t.pop("model.norm.weight")),
        ("lm_head.weight", lambda t: t.pop("lm_head.weight")),
        (
            "model.layers.2.mlp.up_proj.weight",
            lambda t: t.pop("model.layers.2.mlp.up_proj.weight"),
        ),
        (
            "model.layers.1.self_attn.k_proj.weight",
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(24, 24)}),
        ),
        (
            "model.embed_tokens.weight",
            lambda t: t.update({"model.embed_tokens.weight": torch.zeros(54, 24)}),
        ),
        (
            "model.layers.0.self_attn.o_proj.weight",
            lambda t: t.update({"model.layers.0.self_attn.o_proj.weight": torch.zeros(24 * 24)}),
        ),
        (
            "model.layers.0.self_attn.o_proj.bias",
            lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(24)}),
        ),
        (
            "model.layers.3.input_layernorm.weight",
            lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.zeros(24)}),
        ),
    ],
)
def test_wrong_tensors_are_named(
    name: str, change: Callable[[Tensors], Any], tmp_path: Path
) -> None:
    _model(tmp_path)
    with pytest.raises((InvalidCheckpointError, UnsupportedError)) as caught:
        _open(_edit(tmp_path, change))
    assert caught.value.field == f"tensor {name!r}"


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    _model(tmp_path)
    before = _open(tmp_path).digest
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert _open(_edit(tmp_path, lambda t: t.update({name: torch.ones(3)}))).digest == before


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    model = _model(tmp_path, tie_word_embeddings=True)
    before = _open(tmp_path).digest
    head = model.model.embed_tokens.weight.detach().clone()
    weights = _open(_edit(tmp_path, lambda t: t.update({"lm_head.weight": head})))
    assert weights.lm_head is None
    assert weights.digest == before
    head[52, 23] += 1
    with pytest.raises(InvalidCheckpointError, match=r"lm_head\.weight"):
        _open(_edit(tmp_path, lambda t: t.update({"lm_head.weight": head})))


def _index(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = path / INDEX_FILE
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    return path


EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "shard",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "..",
        "a\\b.safetensors",
        "model.bin",
        "missing.safetensors",
        3,
        "x" * 300 + ".safetensors",
    ],
)
def test_bad_shard_names(shard: Any, tmp_path: Path) -> None:
    _model(tmp_path, shard="10KB")
    with pytest.raises(InvalidCheckpointError):
        _open(_index(tmp_path, lambda i: i["weight_map"].update({EMBED: shard})))


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    _model(tmp_path, shard="10KB")
    weight_map = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map[EMBED])
    with pytest.raises(InvalidCheckpointError, match="says it is in"):
        _open(_index(tmp_path, lambda i: i["weight_map"].update({EMBED: other})))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    _model(tmp_path, shard="10KB")
    weight_map = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map[EMBED])
    tensors = load_file(tmp_path / other) | {EMBED: torch.zeros(53, 24)}
    save_file(tensors, tmp_path / other)
    with pytest.raises(InvalidCheckpointError, match="again in") as caught:
        _open(tmp_path)
    assert caught.value.field == f"tensor {EMBED!r}"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map": []}', b" " * (MAX_INDEX_BYTES + 1)]
)
def test_broken_index(content: bytes, tmp_path: Path) -> None:
    _model(tmp_path, shard="10KB")
    (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(InvalidCheckpointError, match="index"):
        _open(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    _model(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    with pytest.raises(InvalidCheckpointError, match=SINGLE_FILE):
        _open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="safetensors"):
        _open(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    _model(tmp_path)
    file = tmp_path / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LoraServeError):
        _open(tmp_path)


def test_the_digest_names_the_weights_and_not_the_files(tmp_path: Path) -> None:
    _model(tmp_path / "one")
    _model(tmp_path / "sharded", shard="10KB")
    _model(tmp_path / "half", dtype=torch.bfloat16)
    one = _open(tmp_path / "one").digest
    assert len(one) == 64
    assert _open(tmp_path / "sharded").digest == one
    assert _open(tmp_path / "half").digest != one


@pytest.mark.parametrize("name", [EMBED, "model.layers.1.input_layernorm.weight"])
def test_the_digest_sees_other_training(name: str, tmp_path: Path) -> None:
    _model(tmp_path)
    before = _open(tmp_path).digest
    assert _open(_edit(tmp_path, lambda t: t[name].mul_(1.0001))).digest != before


def test_the_digest_of_large_tensors_sees_both_ends(tmp_path: Path) -> None:
    digests = set()
    for i in (None, 0, 99_999):
        tensor = torch.zeros(100, 1000)
        if i is not None:
            tensor.view(-1)[i] = 1.0
        save_file({"x": tensor}, tmp_path / "x.safetensors")
        digests.add(digest_tensors(open_safetensors(tmp_path / "x.safetensors")))
    assert len(digests) == 3
