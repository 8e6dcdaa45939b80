"""The whole engine on a GPU: Llama shapes with random weights, base only against mixed ranks.

    python bench/gpu_engine.py [--device cuda] [--model llama-2-7b] [--layers N] [--graphs-off]
        [--budget S] [--out FILE]

The model is written as bfloat16 safetensors under build/gpu_models the first time. With `--layers`
it has fewer than the real one: ratios hold about, times are of so many layers. One JSON object:

- `decode`: the median step with 1k of context by batch and adapters (`base`; `mixed`: one adapter
  for each sequence, ranks 8 to 128 in turn; `shared_r16`, `shared_r128`: one for all). `to_floor`
  of base is by the time its weights and keys and values take at the measured bandwidth of a copy;
  `lora_to_floor` is what adapters add, by the time the bytes of the distinct ones' ranks take.
- `prefill`: a prompt of 2,000 tokens alone, base and with one adapter of each rank; of base also
  the share of the measured rate of a large product (of its linear layers alone, without attention).
- `company`: time to first token (TTFT) and between tokens (TBT) of requests of rank 8, alone, with
  as many more of rank 8 beside them, and with as many of rank 128 instead.
- `graphs_off`: decode steps of an engine that runs without CUDA graphs, by those with.

Parts that would begin after the budget are left out and told. The file is written after each part.
`--tiny` is a small run on any device, to see that the script works: its numbers mean nothing.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_model import (
    RANKS,
    SHAPES,
    Ceilings,
    adapter_bytes,
    ceilings,
    packed_adapter,
    shape_of,
    write_bf16_model,
)
from measured_on import measured_on
from random_model import Shape

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.engine.stats import StepRecord

MODELS = Path(__file__).parents[1] / "build/gpu_models"
INSTALL_TIMEOUT_S = 120.0
TAIL = 95


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    batches: tuple[int, ...] = (64, 16, 1)
    context: int = 1000
    steps: int = 24  # of a decode condition, at least
    prompt: int = 2000
    prompts: int = 3  # of a prefill condition, of which the fastest counts
    copies: int = 13  # adapters of each rank
    clients: int = 16
    company_prompt: int = 256
    company_tokens: int = 64
    company_seconds: float = 3.0
    step_tokens: int = 2048


TINY = Plan((3, 1), 20, 2, 40, 1, 2, 2, 8, 3, 0.2, 64)


class Measured:
    """An engine with adapters of all ranks in its pages."""

    def __init__(self, device: str, shape: Shape, model: Path, plan: Plan) -> None:
        self.shape, self.plan = shape, plan
        kv = 4 * shape.layers * shape.kv_heads * shape.head_dim  # bytes of a token
        rows = max(max(plan.batches), 2 * plan.clients)
        tokens = max(rows * (plan.context + 4 * plan.steps + 64), plan.prompt + 64)
        adapters = plan.copies * sum(adapter_bytes(shape, rank) for rank in RANKS)
        self.kv_token_bytes = kv
        self.engine = Engine(
            EngineConfig(
                model=model,
                device=device,
                memory_bytes=int(1.15 * (tokens * kv + adapters)) + (8 << 20),
                max_batch_tokens=plan.step_tokens,
                max_sequences=rows,
                prefix_cache=False,
                record_steps=True,
            )
        )

    def load_adapters(self) -> float:
        """All into pages; seconds from the first load."""
        packed = {rank: packed_adapter(self.shape, rank) for rank in RANKS}
        begun = time.perf_counter()
        names = {f"r{rank}-{i}" for rank in RANKS for i in range(self.plan.copies)}
        for name in sorted(names):
            self.engine.load_adapter(name, packed[int(name[1:].partition("-")[0])])
        while missing := names - self.engine.installed():
            for name in missing:
                self.engine.prefetch(name)
            time.sleep(0.05)
            if time.perf_counter() - begun > INSTALL_TIMEOUT_S:
                raise TimeoutError(f"{len(missing)} of {len(names)} adapters are not in pages")
        return time.perf_counter() - begun

    def adapters(self, condition: str, batch: int) -> list[str | None]:
        """Of each sequence."""
        if condition == "base":
            return [None] * batch
        if condition.startswith("shared_r"):
            return [f"r{condition.removeprefix('shared_r')}-0"] * batch
        ranks, copies = len(RANKS), self.plan.copies
        return [f"r{RANKS[i % ranks]}-{i // ranks % copies}" for i in range(batch)]

    def records(
        self, adapters: Sequence[str | None], prompt: int, tokens: int, seed: int
    ) -> list[StepRecord]:
        """Of the steps that answer these requests at once, every prompt another."""
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, self.shape.vocabulary, prompt).tolist() for _ in adapters]
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self.engine.take_step_records()
        self.engine.generate(prompts, params, adapters=adapters)
        return self.engine.take_step_records()

    def decode(self, condition: str, batch: int) -> dict[str, Any]:
        """The steps in which all sequences decode and nothing else happens."""
        plan = self.plan
        # The first are answered while the last are still read.
        tokens = plan.steps + 4 + -(-batch * plan.context // max(1, plan.step_tokens - batch))
        chosen = self.adapters(condition, batch)
        steps = [
            record
            for record in self.records(chosen, plan.context, tokens, seed=batch)
            if not record.prefill_tokens and record.decode_tokens == batch and not record.installs
        ][2:]  # a graph is recorded in the second of its kind
        if not steps:
            raise RuntimeError(f"{condition}: the {batch} sequences never decoded all at once")
        distinct = {name for name in chosen if name}
        return {
            "condition": condition,
            "batch": batch,
            "steps": len(steps),
            "step_ms": round(1e3 * float(np.median([step.seconds for step in steps])), 4),
            "kv_bytes": int(self.kv_token_bytes * np.median([s.context_tokens for s in steps])),
            "adapters": len(distinct),
            "adapter_bytes": sum(
                adapter_bytes(self.shape, int(name[1:].partition("-")[0])) for name in distinct
            ),
        }

    def prefill_ms(self, condition: str) -> float:
        """The shortest of some."""
        chosen = self.adapters(condition, 1)
        times = []
        for seed in range(self.plan.prompts + 1):
            records = self.records(chosen, self.plan.prompt, 1, seed)
            times.append(sum(r.seconds for r in records if r.prefill_tokens))
        return round(1e3 * min(times[1:] or times), 4)  # the first makes room and chooses kernels


def linear_weights(shape: Shape) -> int:
    """Of the layers, without the embedding and the output matrix."""
    return shape.layers * sum(i * o for i, o in shape.modules().values())


def step_bytes(shape: Shape) -> int:
    """Of bfloat16 weights that every decode step reads."""
    return 2 * (linear_weights(shape) + shape.vocabulary * shape.hidden)


def decode(bench: Measured, most: Ceilings, batch: int) -> list[dict[str, Any]]:
    found = [
        bench.decode(condition, batch)
        for condition in ("base", "mixed", "shared_r16", "shared_r128")
    ]
    base = found[0]
    rate = most.gb_per_s * 1e6  # bytes of a millisecond
    floor = (step_bytes(bench.shape) + base["kv_bytes"]) / rate
    base["floor_ms"] = round(floor, 4)
    base["to_floor"] = round(base["step_ms"] / floor, 3)
    for row in found[1:]:
        lora = row["step_ms"] - base["step_ms"]
        row["lora_ms"] = round(lora, 4)
        row["lora_to_base"] = round(lora / base["step_ms"], 4)
        row["lora_floor_ms"] = round(row["adapter_bytes"] / rate, 4)
        row["lora_to_floor"] = round(lora / (row["adapter_bytes"] / rate), 3)
    return found


def prefill(bench: Measured, most: Ceilings) -> dict[str, Any]:
    tokens = bench.plan.prompt
    base = bench.prefill_ms("base")
    tflop = 2e-12 * tokens * linear_weights(bench.shape)
    found: dict[str, Any] = {
        "tokens": tokens,
        "base_ms": base,
        "base_tflop_per_s": round(tflop / base * 1e3, 2),
    }
    if most.gemm_tflop_per_s:
        found["base_to_gemm_rate"] = round(tflop / base * 1e3 / most.gemm_tflop_per_s, 3)
    for rank in RANKS:
        with_adapter = bench.prefill_ms(f"shared_r{rank}")
        found[f"r{rank}"] = {
            "ms": with_adapter,
            "lora_to_base": round((with_adapter - base) / base, 4),
        }
    return found


def served(bench: Measured, beside: int | None) -> dict[str, Any]:
    """TTFT and TBT of clients of rank 8 that ask one request after another, with as many clients of
    rank `beside`."""
    plan, engine = bench.plan, bench.engine
    first: list[float] = []
    gaps: list[float] = []
    end = time.perf_counter() + plan.company_seconds
    params = SamplingParams(max_tokens=plan.company_tokens, temperature=0.0, ignore_eos=True)

    async def client(index: int, rank: int, counts: bool) -> None:
        rng = np.random.default_rng(index)
        answered = 0
        while time.perf_counter() < end or not answered:
            prompt = rng.integers(0, bench.shape.vocabulary, plan.company_prompt).tolist()
            last = time.perf_counter()
            fresh = True
            async for chunk in engine.stream(prompt, params, f"r{rank}-{index % plan.copies}"):
                now = time.perf_counter()
                if counts and fresh:
                    first.append(now - last)
                elif counts:
                    each = (now - last) / max(1, len(chunk.token_ids))
                    gaps.extend([each] * len(chunk.token_ids))
                last, fresh = now, False
            answered += 1

    async def all_of_them() -> None:
        clients = [client(i, 8, True) for i in range(plan.clients)]
        if beside is not None:
            clients += [client(plan.clients + i, beside, False) for i in range(plan.clients)]
        await asyncio.gather(*clients)

    asyncio.run(all_of_them())

    def tails(values: list[float], name: str) -> dict[str, float]:
        return {
            f"{name}_p{q}_ms": round(1e3 * float(np.percentile(values, q)), 3) for q in (50, TAIL)
        }

    return {"requests": len(first), **tails(first, "ttft"), **tails(gaps, "tbt")}


def company(bench: Measured) -> dict[str, Any]:
    served(bench, 128)  # graphs and the like
    found: dict[str, Any] = {"clients": bench.plan.clients}
    for name, beside in (("alone", None), ("with_rank_8", 8), ("with_rank_128", 128)):
        found[name] = served(bench, beside)
    for to in ("alone", "with_rank_8"):
        found[f"with_rank_128_to_{to}"] = {
            f"{what}_p{TAIL}": round(
                found["with_rank_128"][f"{what}_p{TAIL}_ms"] / found[to][f"{what}_p{TAIL}_ms"], 3
            )
            for what in ("ttft", "tbt")
        }
    return found


def graphs_off(
    device: str, shape: Shape, model: Path, plan: Plan, with_graphs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Decode again where an engine was told to run every step as it comes."""
    os.environ["LORASERVE_CUDA_GRAPHS"] = "0"
    try:
        bench = Measured(device, shape, model, plan)
    finally:
        del os.environ["LORASERVE_CUDA_GRAPHS"]
    with bench.engine:
        bench.load_adapters()
        found = []
        for row in with_graphs:
            if row["batch"] > 16 or row["condition"] not in ("base", "mixed"):
                continue
            off = bench.decode(row["condition"], row["batch"])
            ratio = round(off["step_ms"] / row["step_ms"], 3)
            found.append({key: off[key] for key in ("condition", "batch", "step_ms")})
            found[-1]["to_with_graphs"] = ratio
        return found


class Report:
    """What is known so far, written after each part."""

    def __init__(self, out: Path | None, budget: float, head: dict[str, Any]) -> None:
        self.found = {**head, "left_out_for_time": []}
        self._out, self._end = out, time.monotonic() + budget

    def has_time(self, part: str) -> bool:
        if time.monotonic() < self._end:
            return True
        self.found["left_out_for_time"].append(part)
        self.write()
        return False

    def add(self, part: str, value: Any) -> None:
        self.found[part] = value
        self.write()

    def write(self) -> str:
        text = json.dumps(self.found, indent=1)
        if self._out:
            self._out.write_text(text + "\n")
        return text


def place(given: argparse.Namespace) -> tuple[Shape, Path]:
    """What is measured and where it is written."""
    shape = shape_of(given.model, given.layers)
    return shape, given.models / f"{given.model}-{shape.layers}"


def measure(report: Report, given: argparse.Namespace, plan: Plan, most: Ceilings) -> None:
    shape, model = place(given)
    begun = time.perf_counter()
    size = write_bf16_model(shape, model)
    report.add("model", {"weight_bytes": size, "write_s": round(time.perf_counter() - begun, 2)})
    begun = time.perf_counter()
    bench = Measured(given.device, shape, model, plan)
    with bench.engine:
        report.add("backend", bench.engine.backend_name)
        report.add("load_s", round(time.perf_counter() - begun, 2))
        report.add("adapters_s", round(bench.load_adapters(), 2))
        rows: list[dict[str, Any]] = []
        for batch in plan.batches:
            if report.has_time(f"decode {batch}"):
                rows += decode(bench, most, batch)
                report.add("decode", rows)
            if batch == plan.batches[0] and report.has_time("prefill"):
                report.add("prefill", prefill(bench, most))
        if report.has_time("company"):
            report.add("company", company(bench))
    if given.graphs_off and report.has_time("graphs_off"):
        report.add("graphs_off", graphs_off(given.device, shape, model, plan, rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="llama-2-7b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the model has")
    parser.add_argument("--models", type=Path, default=MODELS, help="where models are written")
    parser.add_argument("--write-only", action="store_true", help="the model, for a later run")
    parser.add_argument("--graphs-off", action="store_true")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    if given.tiny:
        given.model = "tiny"
    if given.write_only:
        write_bf16_model(*place(given))
        return 0
    about = measured_on()
    most = ceilings(given.device)
    plan = TINY if given.tiny else Plan()
    layers = {"layers": shape_of(given.model, given.layers).layers}
    layers["layers_of_model"] = SHAPES[given.model].layers
    head = {**about, "tiny": given.tiny, "shape": given.model, **layers, "ceilings": asdict(most)}
    report = Report(given.out, given.budget, {**head, "plan": asdict(plan)})
    measure(report, given, plan, most)
    print(report.write())
    return 0


if __name__ == "__main__":
    sys.exit(main())
