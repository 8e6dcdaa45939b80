"""The tensors of a Hugging Face checkpoint by their role, mapped, checked against the config."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loraserve.checkpoint.bounded_json import parse_object
from loraserve.checkpoint.model_config import ModelConfig
from loraserve.checkpoint.safetensors_file import TensorView, open_safetensors
from loraserve.errors import InvalidCheckpointError, UnsupportedError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 4 << 20
MAX_SHARDS = 1024
MAX_NAMES_SHOWN = 5

DIGEST_BLOCKS = 8
DIGEST_BLOCK_BYTES = 512

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}\.safetensors")
# Some converters wrote this buffer into every layer; it follows from the config.
_IGNORED = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")

# Role to the tensor's name within its layer.
_LAYER_NAMES = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}
_EMBED = "model.embed_tokens.weight"
_FINAL_NORM = "model.norm.weight"
_LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Linear weights are [out, in], the rest is one-dimensional."""

    input_norm: TensorView
    q: TensorView
    k: TensorView
    v: TensorView
    o: TensorView
    post_norm: TensorView
    gate: TensorView
    up: TensorView
    down: TensorView
    q_bias: TensorView | None = None
    k_bias: TensorView | None = None
    v_bias: TensorView | None = None
    q_norm: TensorView | None = None
    k_norm: TensorView | None = None


@dataclass(frozen=True)
class ModelWeights:
    """Every weight of a model; the views keep the files mapped."""

    embed_tokens: TensorView
    """[vocab, hidden]"""
    final_norm: TensorView
    lm_head: TensorView | None
    """[vocab, hidden]; None where it is tied to embed_tokens."""
    layers: tuple[LayerWeights, ...]
    digest: str
    """64 hexadecimal digits, see `digest_tensors`."""


def digest_tensors(tensors: Mapping[str, TensorView]) -> str:
    """A sha256 that names a base model, cheaply.

    Hashed, in the order of their names: name, dtype and shape of each tensor, all of its bytes if
    they are at most DIGEST_BLOCKS * DIGEST_BLOCK_BYTES, else that many bytes in evenly spaced
    blocks, the first and the last among them. File names and sharding do not matter; the dtype
    does.

    It tells apart models whose training differed, since training moves nearly every weight. It is
    not a checksum: a flipped bit or a change made on purpose between the blocks is not seen.
    """
    digest = hashlib.sha256(b"loraserve base digest v1\0")
    for name in sorted(tensors):
        view = tensors[name]
        digest.update(f"{name}\0{view.dtype}\0{view.shape}\0".encode())
        flat = view.data.reshape(-1).view(np.uint8)
        if flat.nbytes <= DIGEST_BLOCKS * DIGEST_BLOCK_BYTES:
            digest.update(flat.tobytes())
            continue
        last = flat.nbytes - DIGEST_BLOCK_BYTES
        for block in range(DIGEST_BLOCKS):
            start = last * block // (DIGEST_BLOCKS - 1)
            digest.update(flat[start : start + DIGEST_BLOCK_BYTES].tobytes())
    return digest.hexdigest()


def _shards(path: Path) -> dict[str, str]:
    """Tensor name to file name, from the index."""
    with (path / INDEX_FILE).open("rb") as file:
        index = parse_object(INDEX_FILE, file.read(MAX_INDEX_BYTES + 1), MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    field = f"{INDEX_FILE} weight_map"
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpointError(field, "is not an object with tensor names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise InvalidCheckpointError(field, f"{name!r} is in {shard!r}, not a plain file name")
    if (count := len(set(weight_map.values()))) > MAX_SHARDS:
        raise InvalidCheckpointError(field, f"{count} files, limit {MAX_SHARDS}")
    return weight_map


def _open_sharded(path: Path) -> dict[str, TensorView]:
    weight_map = _shards(path)
    tensors: dict[str, TensorView] = {}
    file_of: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            raise InvalidCheckpointError(shard, f"named in {INDEX_FILE}, but not there")
        for name, view in open_safetensors(path / shard).items():
            if name in file_of:
                raise InvalidCheckpointError(
                    f"tensor {name!r}", f"is in {file_of[name]} and again in {shard}"
                )
            tensors[name], file_of[name] = view, shard
    for name, shard in weight_map.items():
        if file_of.get(name) != shard:
            raise InvalidCheckpointError(f"tensor {name!r}", f"{INDEX_FILE} says it is in {shard}")
    return tensors


def _open_tensors(path: Path) -> dict[str, TensorView]:
    if (path / SINGLE_FILE).is_file():
        return open_safetensors(path / SINGLE_FILE)
    if (path / INDEX_FILE).is_file():
        return _open_sharded(path)
    if (path / "pytorch_model.bin").exists() or (path / "pytorch_model.bin.index.json").exists():
        raise UnsupportedError("pytorch_model.bin", "only safetensors checkpoints are read")
    raise InvalidCheckpointError(SINGLE_FILE, f"neither it nor {INDEX_FILE} in {path.name!r}")


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Role to shape, of the roles that the model has."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_norm": (hidden,),
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "post_norm": (hidden,),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    if config.attention_bias:
        shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    return shapes


def _expected(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    table = (config.vocab_size, config.hidden_size)
    yield _EMBED, table
    yield _FINAL_NORM, (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield _LM_HEAD, table
    for layer in range(config.num_layers):
        for role, shape in _layer_shapes(config).items():
            yield f"model.layers.{layer}.{_LAYER_NAMES[role]}", shape


def _named(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:MAX_NAMES_SHOWN])
    more = len(names) - MAX_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _equal(a: TensorView, b: TensorView) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    rows = 1024  # at a time, so that no large array is made
    bits = "u4" if a.dtype == "F32" else "u2"
    return all(
        np.array_equal(a.data[i : i + rows].view(bits), b.data[i : i + rows].view(bits))
        for i in range(0, a.shape[0], rows)
    )


def _check_tensors(tensors: dict[str, TensorView], config: ModelConfig) -> None:
    """Exactly the expected tensors in their shapes. A tied lm_head is taken out of `tensors`."""
    expected = dict(_expected(config))
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise InvalidCheckpointError(f"tensor {missing[0]!r}", f"missing: {_named(missing)}")
    for name in [name for name in tensors if _IGNORED.fullmatch(name)]:
        del tensors[name]
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise InvalidCheckpointError(
                f"tensor {name!r}", f"shape {tensors[name].shape}, the config asks for {shape}"
            )
    if config.tie_word_embeddings and _LM_HEAD in tensors:
        if not _equal(tensors[_LM_HEAD], tensors[_EMBED]):
            raise InvalidCheckpointError(
                f"tensor {_LM_HEAD!r}", f"tie_word_embeddings is set, but it is not {_EMBED!r}"
            )
        del tensors[_LM_HEAD]
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected:
        raise UnsupportedError(f"tensor {unexpected[0]!r}", f"unexpected: {_named(unexpected)}")


def open_model_weights(path: Path, config: ModelConfig) -> ModelWeights:
    """The weights of the Hugging Face directory `path`, whose config.json gave `config`.

    Raises InvalidCheckpointError or UnsupportedError naming the tensor or the file.
    """
    tensors = _open_tensors(path)
    _check_tensors(tensors, config)
    roles = list(_layer_shapes(config))
    layers = tuple(
        LayerWeights(
            **{role: tensors[f"model.layers.{layer}.{_LAYER_NAMES[role]}"] for role in roles}
        )
        for layer in range(config.num_layers)
    )
    return ModelWeights(
        embed_tokens=tensors[_EMBED],
        final_norm=tensors[_FINAL_NORM],
        lm_head=tensors.get(_LM_HEAD),
        layers=layers,
        digest=digest_tensors(tensors),
    )
