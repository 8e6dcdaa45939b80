"""What config.json of a Hugging Face directory says, as one checked value.

The meaning of every key is transformers' own, in its old spelling (rope_scaling, rope_theta) and
its new one (rope_parameters). What it asks for and we lack is refused by the name of the key.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve.checkpoint.bounded_json import parse_object
from loraserve.errors import InvalidCheckpointError, UnsupportedError

MAX_CONFIG_BYTES = 1 << 20
MAX_VOCAB = 1 << 21
MAX_HIDDEN = 1 << 16
MAX_LAYERS = 512
MAX_HEADS = 1024
MAX_HEAD_DIM = 256
MAX_INTERMEDIATE = 1 << 18
MAX_POSITION = 1 << 24
MAX_EOS_IDS = 64
MAX_ROPE_FACTOR = 1e6
MAX_ROPE_THETA = 1e12


@dataclass(frozen=True)
class LinearRope:
    """All frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Rope:
    """Low frequencies divided by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


RopeScaling = LinearRope | Llama3Rope


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder of the Llama family. Sizes in elements, positions in tokens."""

    family: str
    """ "llama", "mistral", "qwen2" or "qwen3"."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Divides num_heads."""
    head_dim: int
    """Even; heads x head_dim need not be hidden_size."""
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position: int
    """The context length."""
    tie_word_embeddings: bool
    attention_bias: bool
    """q, k and v have a bias; o never has."""
    qk_norm: bool
    """q and k are normalised for each head before the rotation."""
    sliding_window: int | None
    layer_windows: tuple[int | None, ...]
    """For each layer: None attends to everything; w to a token itself and the w - 1 before it."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Of config.json, then those that only generation_config.json has; may be empty."""


@dataclass(frozen=True)
class _Family:
    """What transformers assumes where config.json is silent, and what the code of a family has."""

    name: str
    kv_heads: int | None
    head_dim: int | None
    bos: int | None
    eos: int | None
    qkv_bias: bool
    qk_norm: bool


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", None, None, 1, 2, False, False),
    "MistralForCausalLM": _Family("mistral", 8, None, 1, 2, False, False),
    "Qwen2ForCausalLM": _Family("qwen2", 32, None, None, None, True, False),
    "Qwen3ForCausalLM": _Family("qwen3", 32, 128, None, None, False, True),
}


class _Fields:
    """Typed, bounded reads of one JSON object; `where` names it in errors."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where = where
        self.values = values

    def field(self, key: str) -> str:
        return f"{self.where} {key}"

    def invalid(self, key: str, message: str) -> InvalidCheckpointError:
        return InvalidCheckpointError(self.field(key), message)

    def unsupported(self, key: str, message: str) -> UnsupportedError:
        return UnsupportedError(self.field(key), message)

    def integer(self, key: str, limit: int, default: int | None = None) -> int:
        """A positive integer up to `limit`; a missing or null key without default is an error."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.invalid(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self.invalid(key, f"{_shown(value)} is not an integer from 1 to {limit}")
        return int(value)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from `low` to `high`."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.invalid(key, "is missing")
        # Huge integers do not fit a float: compare before converting.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.invalid(key, f"{_shown(value)} is not a number")
        if not low <= value <= high:
            raise self.invalid(key, f"{_shown(value)} is not from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.invalid(key, f"{_shown(value)} is not true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.invalid(key, f"{_shown(value)} is not a string")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """An integer or a list of them; nothing for a missing or null key."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > MAX_EOS_IDS:
            raise self.invalid(key, f"{len(ids)} ids, limit {MAX_EOS_IDS}")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or abs(token) > MAX_VOCAB:
                raise self.invalid(key, f"{_shown(token)} is not a token id")
        # -1 is how some configurations say "none".
        return tuple(token for token in ids if token >= 0)


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge integer"
    return text if len(text) <= 60 else text[:57] + "..."


def _read_fields(path: Path, name: str) -> _Fields:
    with (path / name).open("rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    return _Fields(name, parse_object(name, raw, MAX_CONFIG_BYTES))


def _family(fields: _Fields) -> _Family:
    supported = ", ".join(_FAMILIES)
    names = fields.values.get("architectures")
    model_type = fields.text("model_type")
    if names is None:
        for family in _FAMILIES.values():
            if family.name == model_type:
                return family
        raise fields.unsupported("model_type", f"{_shown(model_type)}, supported: {supported}")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.invalid("architectures", "is not a list of one name")
    found = _FAMILIES.get(names[0])
    if found is None:
        raise fields.unsupported("architectures", f"{_shown(names[0])}, supported: {supported}")
    if model_type is not None and model_type != found.name:
        raise fields.invalid("model_type", f"{_shown(model_type)} does not go with {names[0]}")
    return found


def _refuse_what_we_lack(fields: _Fields, family: _Family) -> None:
    for key in ("quantization_config", "compression_config"):
        if fields.values.get(key) is not None:
            raise fields.unsupported(key, "quantised checkpoints are not supported")
    if (act := fields.text("hidden_act") or "silu") != "silu":
        raise fields.unsupported("hidden_act", f"{_shown(act)}, supported: silu")
    if fields.boolean("mlp_bias", False):
        raise fields.unsupported("mlp_bias", "a bias in the MLP is not supported")
    # Qwen2 has biases on q, k and v whatever this key says; elsewhere it would bias o as well.
    if family.name != "qwen2" and fields.boolean("attention_bias", False):
        raise fields.unsupported("attention_bias", "would add a bias to o_proj: not supported")


def _rope(fields: _Fields, max_position: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling. As in transformers, a rope_scaling that is not empty takes precedence."""
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(key)
    if values is not None and not isinstance(values, dict):
        raise fields.invalid(key, "is not an object")
    rope = _Fields(fields.field(key), values or {})
    for name, value in rope.values.items():
        if isinstance(value, dict):
            raise rope.unsupported(name, "rope parameters by layer type are not supported")
    for holder in (fields, rope):
        if holder.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
            raise holder.unsupported("partial_rotary_factor", "is not 1, partial rotation")
    outer = fields.number("rope_theta", 1.0, MAX_ROPE_THETA, 10_000.0)
    theta = rope.number("rope_theta", 1.0, MAX_ROPE_THETA, outer)
    kind_key = "rope_type" if rope.values.get("rope_type") is not None else "type"
    kind = rope.text(kind_key) or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRope(rope.number("factor", 1.0, MAX_ROPE_FACTOR))
    if kind != "llama3":
        raise rope.unsupported(kind_key, f"{_shown(kind)}, supported: default, linear, llama3")
    low = rope.number("low_freq_factor", 1e-3, 1e3)
    high = rope.number("high_freq_factor", 1e-3, 1e3)
    if high <= low:
        raise rope.invalid("high_freq_factor", f"{high:g} is not above low_freq_factor {low:g}")
    original = rope.integer("original_max_position_embeddings", MAX_POSITION, max_position)
    if fields.values.get("original_max_position_embeddings") is not None:
        original = fields.integer("original_max_position_embeddings", MAX_POSITION)
    return theta, Llama3Rope(rope.number("factor", 1.0, MAX_ROPE_FACTOR), low, high, original)


def _window(fields: _Fields) -> int | None:
    """transformers' default of 4096 where the key is missing; null means none."""
    if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
        return None
    return fields.integer("sliding_window", MAX_POSITION, 4096)


def _windows(
    fields: _Fields, family: _Family, num_layers: int
) -> tuple[int | None, tuple[int | None, ...]]:
    """The window and where it applies."""
    none: tuple[int | None, ...] = (None,) * num_layers
    if family.name == "llama":
        return None, none
    if family.name == "mistral":
        window = _window(fields)
        return window, (window,) * num_layers
    window = _window(fields) if fields.boolean("use_sliding_window", False) else None
    types = fields.values.get("layer_types")
    if types is None:
        value = fields.values.get("max_window_layers", 28)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise fields.invalid("max_window_layers", f"{_shown(value)} is not a natural number")
        return window, tuple(window if i >= value else None for i in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.invalid("layer_types", f"is not a list of {num_layers} names, one a layer")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise fields.unsupported("layer_types", f"{_shown(kind)} attention")
        if kind == "sliding_attention" and window is None:
            raise fields.invalid("layer_types", "asks for a sliding window, but there is none")
    return window, tuple(window if kind == "sliding_attention" else None for kind in types)


def _eos_ids(path: Path, fields: _Fields, family: _Family) -> tuple[int, ...]:
    ids = list(fields.token_ids("eos_token_id"))
    if "eos_token_id" not in fields.values and family.eos is not None:
        ids = [family.eos]
    if (path / "generation_config.json").is_file():
        ids += _read_fields(path, "generation_config.json").token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))


def read_model_config(path: Path) -> ModelConfig:
    """The configuration of the Hugging Face directory `path`.

    Raises InvalidCheckpointError (missing, broken, out of limits) or UnsupportedError (asks for
    what we lack), both naming the file and the key.
    """
    if not (path / "config.json").is_file():
        raise InvalidCheckpointError("config.json", f"not found in {path.name!r}")
    fields = _read_fields(path, "config.json")
    family = _family(fields)
    _refuse_what_we_lack(fields, family)
    hidden_size = fields.integer("hidden_size", MAX_HIDDEN)
    num_layers = fields.integer("num_hidden_layers", MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads", MAX_HEADS)
    # An absent key has the family's default; null always means as many as there are heads.
    kv_default = num_heads if "num_key_value_heads" in fields.values else family.kv_heads
    num_kv_heads = fields.integer("num_key_value_heads", MAX_HEADS, kv_default or num_heads)
    if num_heads % num_kv_heads:
        raise fields.invalid(
            "num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads"
        )
    head_dim = fields.values.get("head_dim")
    if head_dim is None and family.head_dim is None and hidden_size % num_heads:
        raise fields.invalid("hidden_size", f"{hidden_size} is not a multiple of {num_heads} heads")
    head_dim = fields.integer("head_dim", MAX_HEAD_DIM, family.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise fields.invalid("head_dim", f"{head_dim} is not even, as the rotation needs")
    max_position = fields.integer("max_position_embeddings", MAX_POSITION)
    theta, scaling = _rope(fields, max_position)
    window, layer_windows = _windows(fields, family, num_layers)
    bos = fields.token_ids("bos_token_id")
    if "bos_token_id" not in fields.values and family.bos is not None:
        bos = (family.bos,)
    return ModelConfig(
        family=family.name,
        vocab_size=fields.integer("vocab_size", MAX_VOCAB),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", MAX_INTERMEDIATE),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=max_position,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        layer_windows=layer_windows,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_eos_ids(path, fields, family),
    )


def inverse_frequencies(config: ModelConfig) -> npt.NDArray[np.float32]:
    """Radians per position, float32 [head_dim / 2], scaling applied.

    Each step is rounded to float32 where transformers rounds; only the power is computed in
    float64, so the result does not depend on the machine's float32 `pow`.
    """
    f32 = np.float32
    exponents = np.arange(0, config.head_dim, 2, dtype=f32) / f32(config.head_dim)
    powers = np.power(np.float64(f32(config.rope_theta)), exponents.astype(np.float64))
    plain = f32(1.0) / powers.astype(f32)
    rope = config.rope_scaling
    if rope is None:
        return plain
    factor = f32(rope.factor)
    if isinstance(rope, LinearRope):
        return plain / factor
    old = rope.original_max_position
    low, high = rope.low_freq_factor, rope.high_freq_factor
    # torch divides a number by a tensor as number * (1 / tensor): two roundings.
    wavelength = f32(1.0) / plain * f32(2 * math.pi)
    is_low = wavelength > f32(old / low)
    is_high = wavelength < f32(old / high)
    smooth = (f32(1.0) / wavelength * f32(old) - f32(low)) / f32(high - low)
    blended = (f32(1.0) - smooth) * plain / factor + smooth * plain
    return np.where(is_low, plain / factor, np.where(is_high, plain, blended))
