"""Models and adapters of full size for the GPU benchmarks, made fast, and what a device can do.

Their weights are random in blocks: one block of random bfloat16 numbers is repeated, each tensor
starting elsewhere in it. Times depend on shapes and on where bytes lie; no value matters.
"""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from random_model import Shape, write_config

from loraserve.checkpoint.adapter_source import MODULES, AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import PackedAdapter, pack, parse_packed

SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 96, 64, 512, 16),
    "llama-2-7b": Shape(4096, 32, 32, 32, 11008, 32000, 4096, 128),
    "llama-3-8b": Shape(4096, 32, 32, 8, 14336, 128256, 8192, 128),
}
RANKS = (8, 16, 32, 64, 128)
BLOCK = 1 << 22  # values that are random

Bits = npt.NDArray[np.uint16]


def shape_of(name: str, layers: int = 0) -> Shape:
    """A model's shape, with fewer layers if said so."""
    return replace(SHAPES[name], layers=layers or SHAPES[name].layers)


class Weights:
    """bfloat16 values, as their bits, of about 0.02 in size."""

    def __init__(self, seed: int = 0) -> None:
        values = np.random.default_rng(seed).standard_normal(BLOCK, np.float32) * 0.02
        block: Bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        self._twice = np.concatenate([block, block])
        self._taken = 0

    def take(self, *shape: int) -> Bits:
        self._taken += 7919
        at = self._taken % BLOCK
        size = int(np.prod(shape))
        if size <= BLOCK:
            return self._twice[at : at + size].reshape(shape)
        return np.resize(self._twice[at : at + BLOCK], shape)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (shape.hidden,)
        for name, (inputs, outputs) in shape.modules().items():
            part = "mlp" if name in MODULES[4:] else "self_attn"
            yield f"{prefix}{part}.{name}.weight", (outputs, inputs)


def write_bf16_model(shape: Shape, directory: Path) -> int:
    """A Hugging Face directory of bfloat16 weights; their bytes. One that is whole already stays:
    delete it to have it made anew."""
    done = directory / "complete"
    sizes = {name: 2 * int(np.prod(dims)) for name, dims in _tensors(shape)}
    if done.exists() and done.read_text() == repr(shape):
        return sum(sizes.values())
    directory.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    header: dict[str, Any] = {}
    at = 0
    for name, dims in _tensors(shape):
        end = at + sizes[name]
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    weights = Weights()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, dims in _tensors(shape):
            ones = len(dims) == 1
            file.write((np.full(dims, 0x3F80, np.uint16) if ones else weights.take(*dims)).data)
    write_config(shape, directory, "bfloat16")
    done.write_text(repr(shape))
    return at


def packed_adapter(shape: Shape, rank: int) -> PackedAdapter:
    """Of all seven modules. It may be loaded under many names: each load has pages of its own."""
    weights = Weights(rank)
    modules = tuple(
        AdapterModule(layer, name, rank, 1.0, "BF16", weights.take(rank, i), weights.take(o, rank))
        for layer in range(shape.layers)
        for name in MODULES
        for i, o in [shape.modules()[name]]
    )
    return parse_packed(pack(AdapterSource(None, modules)), verify="none")


def adapter_bytes(shape: Shape, rank: int) -> int:
    """Of one adapter's weights in bfloat16."""
    return 2 * rank * shape.layers * sum(i + o for i, o in shape.modules().values())


@dataclass(frozen=True)
class Ceilings:
    """What the device does at most, as measured here."""

    gb_per_s: float
    """Bytes read and bytes written by a copy within its memory, together."""
    gemm_tflop_per_s: float | None
    """Of a large bfloat16 product; None where nothing but an emulation computes."""
    measured_with: str


def ceilings(device: str) -> Ceilings:
    """On "cuda" with torch, elsewhere of this host's memory: then no number means anything."""
    if device != "cuda":
        host = np.ones(1 << 23, np.float32)
        return Ceilings(_copy_rate(host.nbytes, host.copy), None, "numpy on the host")
    import torch

    def synchronized(work: Any, *arguments: Any) -> Any:
        def run() -> None:
            work(*arguments)
            torch.cuda.synchronize()

        return run

    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = _copy_rate(source.nbytes, synchronized(target.copy_, source))
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    seconds = _shortest(synchronized(torch.matmul, a, a))
    del a, source, target
    torch.cuda.empty_cache()  # the engine's now
    return Ceilings(copied, round(2 * n**3 / seconds / 1e12, 1), f"torch {torch.__version__}")


def _shortest(work: Any, times: int = 10) -> float:
    shortest = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - begun)
    return shortest


def _copy_rate(size: int, work: Any) -> float:
    return round(2 * size / _shortest(work) / 1e9, 1)
