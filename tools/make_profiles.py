"""Writes loraserve/profiles/*.json from published tables (tools/profile_tables).

    python tools/make_profiles.py [--check]

Needs scipy. `--check` fails where the files differ from what the tables give. What every
coefficient rests on is written into the profile's `source`; what is estimated says so, and
`loraserve simulate claims` varies it by a factor of two both ways.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from loraserve.placement.cost_model import CostModel, Profile
from loraserve.sim.recorded import read_recorded
from loraserve.sim.replay import mean_tpot_s, replay

TABLES = Path(__file__).parent / "profile_tables"
PROFILES = Path(__file__).parent.parent / "loraserve/profiles"
RTX = "llmservingsim_rtxpro6000_llama-3.1-8b"
# The recorded run that the overhead of an engine step is fitted on: its first half.
FITTED_REQUESTS = 150
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    """Shapes of a Llama; two bytes per weight."""

    name: str
    hidden: int
    ffn: int
    kv_hidden: int
    layers: int
    vocab: int

    @property
    def projections(self) -> list[tuple[int, int]]:
        h, f, kv = self.hidden, self.ffn, self.kv_hidden
        return [(h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h)]

    @property
    def rank_bytes(self) -> int:
        """Of an adapter on all seven projections, for each unit of rank."""
        return 2 * self.layers * sum(i + o for i, o in self.projections)

    @property
    def rank_flops(self) -> int:
        """Of one token, for each unit of rank."""
        return self.rank_bytes

    @property
    def kv_bytes(self) -> int:
        return 2 * 2 * self.layers * self.kv_hidden

    @property
    def weight_bytes(self) -> int:
        layer = sum(i * o for i, o in self.projections)
        return 2 * (self.layers * layer + 2 * self.vocab * self.hidden)

    @property
    def lora_io_bytes(self) -> int:
        """Of one token: inputs read once for each of the four groups, outputs read and written."""
        inputs = 3 * self.hidden + self.ffn
        outputs = sum(o for _, o in self.projections)
        return 2 * self.layers * (inputs + 2 * outputs)


LLAMA_2_7B = Model("Llama-2-7B", 4096, 11008, 4096, 32, 32000)
LLAMA_3_8B = Model("Llama-3-8B", 4096, 14336, 1024, 32, 128256)


@dataclass(frozen=True)
class Device:
    """`bytes_per_s` and `memory_bytes` as the vendor states them."""

    name: str
    bytes_per_s: float
    memory_bytes: float


A100 = Device("A100-80GB", 2.039e12, 80e9)
H100 = Device("H100-80GB", 3.35e12, 80e9)
RTX_PRO_6000 = Device("RTX-PRO-6000", 1.792e12, 96e9)
# Estimates; see SOURCE below.
LORA_GEMM_EFFICIENCY = 0.5
LAUNCHES_S = 0.5e-3
MEMORY_FOR_ALL = 0.9
# So that a full step, with LoRA, is within the default SLO of 150 ms between tokens.
BATCH_TOKENS = {A100.name: 1024, H100.name: 2048}
ACTIVATION_BYTES = 4e9
# From host memory: four fifths of the line rate of 16 lanes of PCIe 4 and 5 (estimate).
HOST_BYTES_PER_S = {A100.name: 25e9, H100.name: 50e9}

SOURCE = """\
step_s, prefill_token_s, decode_token_s: relative-error NNLS on {table}, prefill 0..2048 \
and decode 0..256 tokens (error p50 {p50:.1%}, p95 {p95:.1%}), plus the engine's own \
{step_ms:.2f} ms a step and {sequence_us:.1f} us a sequence, fitted on the first {fitted} \
requests of the recorded vLLM run (LLMServingSim, RTX PRO 6000). step_s also has \
{launch_ms:.1f} ms for LoRA launches (estimate: 8 dependent kernels a layer, 2 us each). \
prefill_token_s and decode_token_s also have the traffic of LoRA inputs and outputs, \
{io_bytes} bytes a token at the bandwidth below. context_token_s: {kv_bytes} KV bytes a \
token at {efficiency:.0%} of the device's bandwidth, the share that attention reached on \
the RTX PRO 6000 grid (LLMServingSim). chunk_context_s: from the same grid, scaled by the \
prefill speeds of the two devices. adapter_byte_s: every distinct adapter's weights once a \
step at the same bandwidth (BGMV cost follows the largest rank, MBGMV the sum of ranks: \
Toppings, ATC'25, R2 0.96). {rank_term}: 2 FLOP for each weight and token at {gemm:.0%} of \
the device's GEMM speed (estimate). kv_tokens: {memory:.0%} of {device_bytes:.0f} GB less \
weights and 4 GB. install_byte_s: {host:.0f} GB/s from host memory, four fifths of PCIe's line \
rate (estimate). max_batch_tokens: a full step is within 150 ms."""


def read_table(name: str) -> dict[str, Array]:
    with (TABLES / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


def fit(features: Array, seconds: Array) -> tuple[Array, Array]:
    """Coefficients of at least 0 that make the relative errors small, and those errors."""
    found, _ = nnls(features / seconds[:, None], np.ones(len(seconds)))
    return found, np.abs(features @ found / seconds - 1)


def vidur_seconds(name: str, layers: int) -> Callable[[Array], Array]:
    table = read_table(name)
    per_layer = sum(v for k, v in table.items() if k not in ("num_tokens", "emb", "add"))
    once = table["emb"]
    # Two residual additions in a layer; the table times one.
    milliseconds = layers * (per_layer + 2 * table["add"]) + once
    return lambda tokens: np.interp(tokens, table["num_tokens"], milliseconds) * 1e-3


def layers_seconds(name: str, layers: int) -> Callable[[Array], Array]:
    """LLMServingSim's older table; its attention is left out, as it has no context."""
    table = read_table(name)
    outside = ("tokens", "embedding", "final_layernorm", "lm_head", "attn")
    per_layer = sum(v for k, v in table.items() if k not in outside)
    nanoseconds = layers * per_layer + table["embedding"] + table["final_layernorm"]
    return lambda tokens: np.interp(tokens, table["tokens"], nanoseconds) * 1e-9


@dataclass(frozen=True)
class Calibration:
    """What the RTX PRO 6000 tables and the first half of the recorded run give."""

    cost: CostModel
    step_s: float
    sequence_s: float
    bandwidth_share: float


def rtx_kernels() -> CostModel:
    """Kernel times of one step, linear in its features."""
    dense, heads = read_table(f"{RTX}_dense"), read_table(f"{RTX}_per_sequence")
    grid = read_table(f"{RTX}_attention")
    layers = LLAMA_3_8B.layers
    outside = ("tokens", "embedding", "final_layernorm")
    per_layer = sum(v for k, v in dense.items() if k not in outside) + dense["layernorm"]
    step_us = layers * per_layer + dense["embedding"] + dense["final_layernorm"]
    head_us = heads["lm_head"] + heads["sampler"]
    # Pure steps at the batch sizes and contexts of a loaded server.
    chunk, before = grid["prefill_chunk"], grid["kv_prefill"]
    decodes, context = grid["n_decode"], grid["kv_decode"]
    pure_prefill = (decodes == 0) & (before <= 2048)
    pure_decode = (chunk == 0) & (decodes >= 8) & (context >= 128) & (context <= 4096)
    use = pure_prefill | pure_decode
    chunk, before, decodes, context = (v[use] for v in (chunk, before, decodes, context))
    seconds = 1e-6 * (
        np.interp(chunk + decodes, dense["tokens"], step_us)
        + np.interp(decodes + (chunk > 0), heads["sequences"], head_us)
        + layers * grid["time_us"][use]
    )
    features = [
        np.ones_like(chunk),
        chunk,
        decodes,
        decodes * context,
        chunk * (before + (chunk + 1) / 2),
    ]
    found, _ = fit(np.stack(features, axis=1), seconds)
    return CostModel(*(float(v) for v in found))


def calibrate() -> Calibration:
    kernels = rtx_kernels()
    recorded = read_recorded()[:FITTED_REQUESTS]
    everything = [r.request for r in read_recorded()]
    tpot = np.array([r.tpot_s for r in recorded])

    def with_overhead(step_ms: float, sequence_us: float) -> CostModel:
        return replace(
            kernels,
            step_s=kernels.step_s + step_ms * 1e-3,
            decode_token_s=kernels.decode_token_s + sequence_us * 1e-6,
        )

    def error(overhead: Array) -> float:
        cost = with_overhead(*np.abs(overhead))
        done = replay(rtx_profile(cost), everything)[:FITTED_REQUESTS]
        mean = np.array([mean_tpot_s([sequence]) for sequence in done])
        return float(np.mean((mean / tpot - 1) ** 2))

    found = np.abs(minimize(error, [1.0, 20.0], method="Nelder-Mead").x)
    step_ms, sequence_us = (float(v) for v in found)
    share = LLAMA_3_8B.kv_bytes / kernels.context_token_s / RTX_PRO_6000.bytes_per_s
    return Calibration(
        with_overhead(step_ms, sequence_us), step_ms * 1e-3, sequence_us * 1e-6, share
    )


def rtx_profile(cost: CostModel) -> Profile:
    return Profile(
        name="rtx-pro-6000-llama-3-8b-base",
        base=LLAMA_3_8B.name,
        device=RTX_PRO_6000.name,
        cost=cost,
        max_batch_tokens=2048,
        max_sequences=128,
        bytes_per_rank=LLAMA_3_8B.rank_bytes,
        source="Without LoRA terms, to be checked against the recorded vLLM run. Kernels: relative-"
        "error NNLS on the tables of LLMServingSim. The engine's own time, seconds a step and a "
        f"sequence: fitted on the TPOT of the first {FITTED_REQUESTS} recorded requests.",
    )


def derived(
    model: Model,
    device: Device,
    table: str,
    seconds_of: Callable[[Array], Array],
    calibration: Calibration,
    padded: bool,
) -> Profile:
    prefill, decode = np.meshgrid(
        np.array([0, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048], float),
        np.array([0, 1, 4, 16, 32, 64, 128, 192, 256], float),
    )
    tokens = (prefill + decode).ravel()
    use = (tokens > 0) & (tokens <= 2048)
    seconds = seconds_of(tokens[use])
    # The head: its weights are read once a step.
    bandwidth = calibration.bandwidth_share * device.bytes_per_s
    seconds = seconds + 2 * model.vocab * model.hidden / bandwidth
    features = np.stack([np.ones_like(tokens), prefill.ravel(), decode.ravel()], axis=1)[use]
    (step_s, prefill_s, decode_s), errors = fit(features, seconds)
    gemm_flops = 2 * (model.weight_bytes / 2) / prefill_s
    token_rank_s = model.rank_flops / (LORA_GEMM_EFFICIENCY * gemm_flops)
    io_s = model.lora_io_bytes / bandwidth
    speed = prefill_s / calibration.cost.prefill_token_s
    cost = CostModel(
        step_s=rounded(step_s + calibration.step_s + LAUNCHES_S),
        prefill_token_s=rounded(prefill_s + io_s),
        decode_token_s=rounded(decode_s + calibration.sequence_s + io_s),
        context_token_s=rounded(model.kv_bytes / bandwidth),
        chunk_context_s=rounded(calibration.cost.chunk_context_s * speed),
        token_rank_s=0.0 if padded else rounded(token_rank_s),
        token_max_rank_s=rounded(token_rank_s) if padded else 0.0,
        adapter_byte_s=rounded(1 / bandwidth),
    )
    kind = "padded" if padded else "proportional"
    free = MEMORY_FOR_ALL * device.memory_bytes - model.weight_bytes - ACTIVATION_BYTES
    return Profile(
        name=f"{device.name.split('-')[0].lower()}-{model.name.lower()}-{kind}",
        base=model.name,
        device=device.name,
        cost=cost,
        max_batch_tokens=BATCH_TOKENS[device.name],
        max_sequences=128 if model is LLAMA_2_7B else 256,
        bytes_per_rank=model.rank_bytes,
        kv_tokens=math.floor(free / model.kv_bytes / 1000) * 1000,
        kv_token_bytes=model.kv_bytes,
        install_byte_s=1 / HOST_BYTES_PER_S[device.name],
        padded=padded,
        source=SOURCE.format(
            table=table,
            p50=np.percentile(errors, 50),
            p95=np.percentile(errors, 95),
            step_ms=calibration.step_s * 1e3,
            sequence_us=calibration.sequence_s * 1e6,
            fitted=FITTED_REQUESTS,
            launch_ms=LAUNCHES_S * 1e3,
            io_bytes=model.lora_io_bytes,
            kv_bytes=model.kv_bytes,
            efficiency=calibration.bandwidth_share,
            rank_term="token_max_rank_s" if padded else "token_rank_s",
            gemm=LORA_GEMM_EFFICIENCY,
            memory=MEMORY_FOR_ALL,
            device_bytes=device.memory_bytes / 1e9,
            host=HOST_BYTES_PER_S[device.name] / 1e9,
        ),
    )


def profiles() -> list[Profile]:
    calibration = calibrate()
    rtx = {k: rounded(v) for k, v in asdict(calibration.cost).items()}
    made = [rtx_profile(CostModel(**rtx))]
    vidur, llms = "microsoft/vidur {}", "casys-kaist/LLMServingSim {}"
    for model, device, table, seconds_of in (
        (LLAMA_2_7B, A100, vidur, vidur_seconds("vidur_a100_llama-2-7b", 32)),
        (LLAMA_3_8B, A100, vidur, vidur_seconds("vidur_a100_llama-3-8b", 32)),
        (LLAMA_2_7B, H100, vidur, vidur_seconds("vidur_h100_llama-2-7b", 32)),
        (LLAMA_3_8B, H100, llms, layers_seconds("llmservingsim_h100_llama-3.1-8b", 32)),
    ):
        cited = table.format(f"{device.name} {model.name}")
        for padded in (False, True):
            made.append(derived(model, device, cited, seconds_of, calibration, padded))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    differ = []
    for profile in profiles():
        path = PROFILES / f"{profile.name}.json"
        text = json.dumps(asdict(profile), indent=2) + "\n"
        if check and (not path.exists() or path.read_text() != text):
            differ.append(path.name)
        elif not check:
            path.write_text(text)
            cost = {k: v for k, v in asdict(profile.cost).items() if v}
            print(profile.name, json.dumps(cost), profile.kv_tokens)
    if differ:
        print(f"differ from the tables: {', '.join(differ)}", file=sys.stderr)
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
