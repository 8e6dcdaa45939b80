"""The LoRA kernels of vLLM and SGLang, timed as ours are, where their sources and torch are.

Neither project is installed or imported as a whole: a directory given by the caller holds the
folders `vllm/lora/ops/triton_ops` (0.33) and `sglang/kernels/ops/lora/dense` (0.5.23) as their
wheels have them, and stand-ins take the place of what those files import besides. All kernels of a
step are captured in one CUDA graph, whose replay is timed; caches are overwritten before each.

vLLM ships no tuned configurations: unless VLLM_TUNED_CONFIG_FOLDER names some, a few of them are
tried here for each group of modules and the fastest is kept, which is less than its own tuning.
"""

import importlib
import itertools
import os
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

GROUPS = ((0, 3), (3, 4), (4, 6), (6, 7))  # modules that share their input
SGLANG_CHUNK = 16  # its default max_lora_chunk_size
VLLM_SHRINK = [  # overrides of its default; the first is none
    {},
    *({"block_m": 16, "block_n": n, "split_k": k} for n, k in ((16, 16), (32, 8), (64, 16))),
]
VLLM_EXPAND: list[dict[str, int]] = [
    {},
    *({"block_m": 16, "block_n": n, "block_k": k} for n, k in ((64, 32), (128, 32), (256, 16))),
]


def _module(name: str, path: Path | None = None, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(names)
    module.__path__ = [str(path)] if path else []
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)
    return module


class _Silent:
    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _Unset:
    """Every variable of SGLang's environment is off."""

    def __getattr__(self, _: str) -> Any:
        return types.SimpleNamespace(get=lambda: False)


def _stand_in_for_vllm(directory: Path) -> None:
    import torch
    import triton
    import triton.language as tl

    variables: dict[str, Any] = {
        "VLLM_BATCH_INVARIANT": False,
        "VLLM_LORA_DISABLE_PDL": False,
        "VLLM_LORA_ENABLE_DUAL_STREAM": False,
        "VLLM_TUNED_CONFIG_FOLDER": os.environ.get("VLLM_TUNED_CONFIG_FOLDER"),
    }

    def platform_has(_: object, *capability: Any) -> bool:
        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        return bool(10 * major + minor >= capability[0])

    def refused(**_: Any) -> None:
        raise AttributeError  # the files then take their plain functions

    def to_device(values: Any, dtype: Any, device: Any, **_: Any) -> Any:
        return torch.tensor(values, dtype=dtype, device=device)

    platform = type(
        "Platform",
        (),
        {
            "is_cuda": lambda _: torch.cuda.is_available(),
            "has_device_capability": platform_has,
            "is_device_capability": lambda self, c: (
                platform_has(self, c) and not platform_has(self, c + 1)
            ),
        },
    )()
    _module("vllm")
    _module("vllm.envs", **variables)
    _module("vllm.logger", init_logger=lambda _: _Silent())
    _module("vllm.platforms", current_platform=platform)
    _module("vllm.triton_utils", tl=tl, triton=triton)
    _module("vllm.utils")
    _module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2, cdiv=triton.cdiv)
    _module("vllm.utils.torch_utils", async_tensor_h2d=to_device, direct_register_custom_op=refused)
    _module("vllm.lora")
    _module("vllm.lora.ops")
    _module("vllm.lora.ops.triton_ops", directory / "vllm/lora/ops/triton_ops")


def _stand_in_for_sglang(directory: Path) -> None:
    import torch

    def device_name() -> str:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"

    for name in ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.kernels"):
        _module(name)
    _module("sglang.kernels.ops")
    _module("sglang.kernels.ops.lora")
    _module("sglang.srt.environ", envs=_Unset())
    _module("sglang.srt.lora.utils", LoRABatchInfo=object)
    _module(
        "sglang.srt.utils",
        cached_triton_kernel=lambda _: lambda kernel: kernel,
        get_device_name=device_name,
    )
    _module("sglang.kernels.ops.lora.dense", directory / "sglang/kernels/ops/lora/dense")


@dataclass
class Pool:
    """Adapters in torch tensors, all of room for rank `room`; of each layer and module A [adapters,
    room, in] and B [adapters, out, room]. What is past an adapter's own rank is zero."""

    room: int
    ranks: list[int]
    a: list[list[Any]]
    b: list[list[Any]]

    @staticmethod
    def random(
        torch: Any,
        device: str,
        layers: int,
        shapes: list[tuple[int, int]],
        ranks: list[int],
        dtype: str = "bfloat16",
    ) -> "Pool":
        room, count = max(ranks), len(ranks)
        generator = torch.Generator(device=device).manual_seed(0)

        def values(*shape: int) -> Any:
            made = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            return made.normal_(0, 0.05, generator=generator)

        a = [[values(count, room, i) for i, _ in shapes] for _ in range(layers)]
        b = [[values(count, o, room) for _, o in shapes] for _ in range(layers)]
        for layer, module, (index, rank) in itertools.product(
            range(layers), range(len(shapes)), enumerate(ranks)
        ):
            a[layer][module][index, rank:].zero_()
            b[layer][module][index, :, rank:].zero_()
        return Pool(room, ranks, a, b)


class Vllm:
    """Shrink and expand of all slices of a group, at the pool's largest rank."""

    def __init__(self, torch: Any, pool: Pool) -> None:
        package = "vllm.lora.ops.triton_ops."
        self._torch, self._pool = torch, pool
        self._shrink = importlib.import_module(package + "lora_shrink_op")
        self._expand = importlib.import_module(package + "lora_expand_op")
        self._meta = importlib.import_module(package + "lora_kernel_metadata").LoRAKernelMeta
        utils = importlib.import_module(package + "utils")
        utils._LORA_A_PTR_DICT.clear()  # by addresses, which come again
        utils._LORA_B_PTR_DICT.clear()
        self._configs = utils.get_lora_op_configs
        self.tuned: dict[tuple[str, int], dict[str, int]] = {}
        self._group = 0
        for op in (self._shrink, self._expand):
            vars(op)["get_lora_op_configs"] = self._config

    def _config(self, op_type: str, **arguments: Any) -> dict[str, Any]:
        return {**self._configs(op_type, **arguments), **self.tuned.get((op_type, self._group), {})}

    def prepare(self, chosen: list[int]) -> None:
        device = self._pool.a[0][0].device
        meta = self._meta.make(len(self._pool.ranks), len(chosen), device)
        meta.prepare_tensors(self._torch.tensor(chosen, dtype=self._torch.int32, device=device))
        self._arguments = meta.meta_args(len(chosen), True)

    def run(self, layer: int, group: int, x: Any, y: Any) -> None:
        begin, end = GROUPS[group]
        self._group = group
        h = self._torch.empty(
            (end - begin, len(x), self._pool.room), dtype=self._torch.float32, device=x.device
        )
        self._shrink.lora_shrink(x, self._pool.a[layer][begin:end], h, *self._arguments, 1.0)
        self._expand.lora_expand(
            h, self._pool.b[layer][begin:end], y, *self._arguments, 0, add_inputs=True
        )


class Sglang:
    """Chunked SGMV, which is told each adapter's own rank."""

    def __init__(self, torch: Any, pool: Pool) -> None:
        package = "sglang.kernels.ops.lora.dense."
        self._torch = torch
        self._shrink = importlib.import_module(package + "chunked_sgmv_shrink")
        self._expand = importlib.import_module(package + "chunked_sgmv_expand")
        self._count = len(pool.ranks)
        device = pool.a[0][0].device
        self._ranks = torch.tensor(pool.ranks, dtype=torch.int32, device=device)
        self._scalings = torch.ones(self._count, device=device)
        self._a, self._b, self._offsets = [], [], []
        for begin, end in GROUPS:
            outs = [0, *itertools.accumulate(b.shape[1] for b in pool.b[0][begin:end])]
            self._offsets.append(torch.tensor(outs, dtype=torch.int32))
        for a, b in zip(pool.a, pool.b, strict=True):
            self._a.append([self._stacked(a[begin:end], pool) for begin, end in GROUPS])
            self._b.append([torch.cat(b[begin:end], 1).contiguous() for begin, end in GROUPS])

    def _stacked(self, a: list[Any], pool: Pool) -> Any:
        """The slices' ranks one after another, without gaps: [adapters, slices * room, in]."""
        out = self._torch.zeros_like(self._torch.cat(a, 1))
        for index, rank in enumerate(pool.ranks):
            for i, one in enumerate(a):
                out[index, i * rank : (i + 1) * rank] = one[index, :rank]
        return out

    def prepare(self, chosen: list[int]) -> None:
        segments: list[tuple[int, int]] = []  # adapter, rows
        for adapter, rows in itertools.groupby(chosen):
            left = len(list(rows))
            while left > 0:
                segments.append((adapter, min(left, SGLANG_CHUNK)))
                left -= SGLANG_CHUNK
        device = self._ranks.device

        def numbers(values: Any) -> Any:
            return self._torch.tensor(list(values), dtype=self._torch.int32, device=device)

        self._info = types.SimpleNamespace(
            max_len=SGLANG_CHUNK,
            num_segments=len(segments),
            use_cuda_graph=False,
            weight_indices=numbers(adapter for adapter, _ in segments),
            seg_indptr=numbers([0, *itertools.accumulate(rows for _, rows in segments)]),
            lora_ranks=self._ranks,
            scalings=self._scalings,
            permutation=numbers(range(len(chosen))),
        )
        self._device_offsets = [offsets.to(device) for offsets in self._offsets]

    def run(self, layer: int, group: int, x: Any, y: Any) -> None:
        offsets = self._offsets[group]
        h = self._shrink.chunked_sgmv_lora_shrink_forward(
            x, self._a[layer][group], self._info, len(offsets) - 1
        )
        self._expand.chunked_sgmv_lora_expand_forward(
            h,
            self._b[layer][group],
            self._info,
            self._device_offsets[group],
            int(offsets.diff().max()),
            y,
            offsets,
        )


PEERS: dict[str, tuple[Callable[[Path], None], Any]] = {
    "vllm": (_stand_in_for_vllm, Vllm),
    "sglang": (_stand_in_for_sglang, Sglang),
}


def open_peer(name: str, directory: Path, pool: Pool) -> Any:
    """Raises ImportError or OSError where the sources or what they need are not there."""
    import torch

    stand_in, peer = PEERS[name]
    if name not in sys.modules:
        stand_in(directory.resolve())
    return peer(torch, pool)


class Timed:
    """A peer's LoRA of all layers, captured in a graph."""

    def __init__(self, peer: Any, shapes: list[tuple[int, int]], layers: int, flush: int) -> None:
        import torch

        self._torch, self._peer, self._shapes, self._layers = torch, peer, shapes, layers
        self._flush = torch.zeros(flush, dtype=torch.uint8, device="cuda")

    @property
    def tuned(self) -> dict[tuple[str, int], dict[str, int]]:
        """What `tune` kept, by operation and group; nothing of a peer that is not tuned here."""
        return getattr(self._peer, "tuned", {})

    def _activations(self, rows: int) -> list[tuple[Any, Any]]:
        def zeros(columns: int) -> Any:
            return self._torch.zeros(rows, columns, dtype=self._torch.bfloat16, device="cuda")

        return [
            (zeros(self._shapes[begin][0]), zeros(sum(o for _, o in self._shapes[begin:end])))
            for begin, end in GROUPS
        ]

    def seconds(self, chosen: list[int], repeats: int, groups: tuple[int, ...] = ()) -> float:
        """The median of some. All groups of modules, or those given."""
        torch, work = self._torch, self._activations(len(chosen))
        self._peer.prepare(chosen)

        def step() -> None:
            for layer in range(self._layers):
                for group in groups or range(len(GROUPS)):
                    self._peer.run(layer, group, *work[group])

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        times = []
        for _ in range(repeats + 1):
            self._flush.add_(1)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return sorted(times[1:])[repeats // 2]

    def tune(self, chosen: list[int], repeats: int, end: float) -> None:
        """Of vLLM: of each group, what of the lists above is fastest, shrink and expand apart."""
        tried = [("shrink", VLLM_SHRINK), ("expand", VLLM_EXPAND)]
        if not hasattr(self._peer, "tuned") or os.environ.get("VLLM_TUNED_CONFIG_FOLDER"):
            return
        for group, (op_type, candidates) in itertools.product(range(len(GROUPS)), tried):
            best = float("inf")
            kept: dict[str, int] = {}
            for candidate in candidates:
                if time.monotonic() > end:
                    break
                self._peer.tuned[op_type, group] = candidate
                seconds = self.seconds(chosen, repeats, (group,))
                if seconds < best:
                    best, kept = seconds, candidate
            self._peer.tuned[op_type, group] = kept
