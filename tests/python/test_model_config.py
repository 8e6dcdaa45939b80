"""config.json as transformers writes it, and as nobody should."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz_budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from loraserve.checkpoint.model_config import (
    MAX_HEAD_DIM,
    MAX_LAYERS,
    LinearRope,
    Llama3Rope,
    inverse_frequencies,
    read_model_config,
)
from loraserve.errors import InvalidCheckpointError, UnsupportedError

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5},
    {**LLAMA3, "rope_theta": 500000.0},
    {**LLAMA3, "rope_theta": 12345.678, "factor": 32.0, "high_freq_factor": 5.0},
]


def _llama(tmp_path: Path, **changes: Any) -> Path:
    """A Llama directory whose config.json has `changes`; ... removes a key."""
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return _change(tmp_path, **changes)


def _change(path: Path, **changes: Any) -> Path:
    file = path / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return path


def _legacy(path: Path) -> Path:
    """Rewrites config.json as transformers 4 spelt it."""
    values = json.loads((path / "config.json").read_text())
    rope = values.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    if scaling is not None:
        scaling["type"] = scaling.pop("rope_type")
    return _change(path, rope_parameters=..., rope_theta=theta, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"head_dim": 20, "tie_word_embeddings": True, "eos_token_id": [5, 7]}),
        (MistralConfig, {"sliding_window": 100}),
        (MistralConfig, {"sliding_window": None, "head_dim": 32}),
        (Qwen2Config, {}),
        (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 9}),
        (Qwen3Config, {}),
        (
            Qwen3Config,
            {
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "head_dim": 16,
                "bos_token_id": 3,
                "eos_token_id": 4,
            },
        ),
    ],
)
def test_equals_transformers(kind: type[Any], options: dict[str, Any], tmp_path: Path) -> None:
    kind(**SIZES, **options).save_pretrained(tmp_path)
    ours, theirs = read_model_config(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert ours.family == theirs.model_type
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    derived = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == getattr(theirs, "head_dim", derived)
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.attention_bias == (ours.family == "qwen2")
    assert ours.qk_norm == (ours.family == "qwen3")
    assert ours.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (eos if isinstance(eos, list) else [eos] if eos else [])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MistralConfig, {"sliding_window": 7}),
        (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7}),
        (Qwen2Config, {"use_sliding_window": False, "max_window_layers": 1, "sliding_window": 7}),
        (
            Qwen3Config,
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
        ),
    ],
)
def test_windows_are_those_of_the_attention_modules(
    kind: type[Any], options: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    kind(**SIZES, **options).save_pretrained(tmp_path)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.from_pretrained(tmp_path))
    ours = read_model_config(tmp_path)
    theirs = tuple(
        getattr(layer.self_attn, "sliding_window", model.config.sliding_window)
        for layer in model.model.layers
    )
    assert ours.layer_windows == theirs
    assert ours.sliding_window == model.config.sliding_window


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_inverse_frequencies_equal_transformers(
    rope: dict[str, Any], head_dim: int, legacy: bool, tmp_path: Path
) -> None:
    config = LlamaConfig(**SIZES, head_dim=head_dim, rope_parameters=dict(rope))
    config.save_pretrained(tmp_path)
    theirs = LlamaRotaryEmbedding(config).inv_freq.numpy()
    if legacy:
        _legacy(tmp_path)
    ours = inverse_frequencies(read_model_config(tmp_path))
    assert ours.dtype == np.float32
    assert ours.shape == (head_dim // 2,)
    # Equal bit for bit but where NumPy's power and torch's round apart; llama3's blend then
    # subtracts nearly equal numbers.
    assert (ours == theirs).mean() >= 0.95
    np.testing.assert_allclose(ours, theirs, rtol=4e-7, atol=0)


def test_rope_scaling_is_read_in_both_spellings(tmp_path: Path) -> None:
    LlamaConfig(**SIZES, rope_parameters={**LLAMA3, "rope_theta": 5e5}).save_pretrained(tmp_path)
    new = read_model_config(tmp_path)
    assert new.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 512)
    assert new.rope_theta == 5e5
    assert read_model_config(_legacy(tmp_path)) == new
    _change(tmp_path, rope_scaling={"type": "linear", "factor": 3})
    assert read_model_config(tmp_path).rope_scaling == LinearRope(3.0)


def test_missing_keys_have_transformers_defaults(tmp_path: Path) -> None:
    path = _llama(
        tmp_path,
        num_key_value_heads=...,
        head_dim=...,
        rms_norm_eps=...,
        rope_parameters=...,
        bos_token_id=...,
        eos_token_id=...,
        architectures=...,
    )
    theirs, ours = AutoConfig.from_pretrained(path), read_model_config(path)
    assert ours.num_kv_heads == theirs.num_key_value_heads == 6
    assert ours.head_dim == theirs.head_dim == 8
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    assert theirs.eos_token_id == 2


def test_end_tokens_of_the_generation_config_are_added(tmp_path: Path) -> None:
    path = _llama(tmp_path, eos_token_id=9)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9, 10]}))
    assert read_model_config(path).eos_token_ids == (9, 8, 10)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": "two"}))
    with pytest.raises(InvalidCheckpointError) as caught:
        read_model_config(path)
    assert caught.value.field == "generation_config.json eos_token_id"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"architectures": None, "model_type": "mixtral"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ],
)
def test_what_we_lack_is_refused_by_name(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_model_config(_llama(tmp_path, **changes))
    assert caught.value.field.split()[-1] == key


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 48.0}, "hidden_size"),
        ({"hidden_size": 10**4000}, "hidden_size"),
        ({"hidden_size": 50, "head_dim": ...}, "hidden_size"),
        ({"num_hidden_layers": MAX_LAYERS + 1}, "num_hidden_layers"),
        ({"num_attention_heads": -6}, "num_attention_heads"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"num_key_value_heads": 12}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": MAX_HEAD_DIM + 2}, "head_dim"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"intermediate_size": "80"}, "intermediate_size"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_type"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"model_type": "mistral"}, "model_type"),
        ({"architectures": []}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"eos_token_id": [1.5]}, "eos_token_id"),
        ({"eos_token_id": list(range(1000))}, "eos_token_id"),
    ],
)
def test_broken_values_name_the_key(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError) as caught:
        read_model_config(_llama(tmp_path, **changes))
    assert caught.value.field.split()[-1] == key


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"layer_types": [[]] * 4}, "layer_types"),
        ({"layer_types": ..., "max_window_layers": -1}, "max_window_layers"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"use_sliding_window": "yes"}, "use_sliding_window"),
    ],
)
def test_broken_windows_name_the_key(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    Qwen2Config(**SIZES).save_pretrained(tmp_path)
    with pytest.raises((InvalidCheckpointError, UnsupportedError)) as caught:
        read_model_config(_change(tmp_path, **changes))
    assert caught.value.field == f"config.json {key}"


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match=r"config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * (2 << 20) + b"{}")
    with pytest.raises(InvalidCheckpointError, match="limit"):
        read_model_config(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
_KEYS = [
    *SIZES,
    *("architectures", "model_type", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "hidden_act", "eos_token_id", "bos_token_id", "tie_word_embeddings"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "mlp_bias"),
    *("attention_bias", "quantization_config", "partial_rotary_factor"),
]


@settings(max_examples=examples(150), deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    changes=st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=4),
)
def test_any_json_is_a_config_or_a_typed_error(
    family: str, changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.mkdir(exist_ok=True)
    values = {**SIZES, "model_type": family, **changes}
    (path / "config.json").write_text(json.dumps(values).replace("Infinity", "1e999"))
    try:
        config = read_model_config(path)
    except (InvalidCheckpointError, UnsupportedError):
        return
    assert config.num_heads % config.num_kv_heads == 0
    assert np.isfinite(inverse_frequencies(config)).all()
