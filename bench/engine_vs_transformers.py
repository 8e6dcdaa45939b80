"""Our CPU engine beside transformers and PEFT: same checkpoint, same process, interleaved.

    python bench/engine_vs_transformers.py [--repeats 5] [--threads 2] [--out FILE]

The checkpoint is a random Llama of 120M parameters with eight adapters of ranks 8 to 128 on all
seven modules, made in a temporary directory. Four shapes are timed, each as often as --repeats
says, ours and theirs in turn; medians and ratios go to one JSON object with machine, commit and
command.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured_on import commit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loraserve import Engine, EngineConfig, SamplingParams

RANKS = (8, 16, 32, 64, 128, 8, 16, 128)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREFILL, BATCH, CONTEXT, STEPS = 512, 8, 8, 24


def make_checkpoint(root: Path) -> tuple[Path, list[Path]]:
    """Base and adapters, random with non-zero B; float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(root / "base")
    adapters = []
    for index, rank in enumerate(RANKS):
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=MODULES, init_lora_weights=False)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), lora)
        adapters.append(root / f"a{index}")
        model.save_pretrained(adapters[-1])
    return root / "base", adapters


def timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Ours:
    """The engine, bench-shaped: every call computes all it is asked for, no prefix cache."""

    def __init__(self, base: Path, adapters: list[Path], threads: int, weight_dtype: Any) -> None:
        self.engine = Engine(
            EngineConfig(
                model=base, weight_dtype=weight_dtype, adapter_dtype=weight_dtype,
                threads=threads, prefix_cache=False, max_batch_tokens=PREFILL,
            )
        )  # fmt: skip
        for path in adapters:
            self.engine.load_adapter(path.name, path)
        self.names = [path.name for path in adapters]

    def run(self, prompts: list[list[int]], steps: int, mixed: bool) -> None:
        params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
        names: list[str | None] = [*self.names] if mixed else [None] * len(prompts)
        self.engine.generate(prompts, params, names[: len(prompts)])


class Theirs:
    """transformers for the base, PEFT's mixed batches (adapter_names) for adapters."""

    def __init__(self, base: Path, adapters: list[Path]) -> None:
        self.base = LlamaForCausalLM.from_pretrained(base).eval()
        # The same weights a second time: PEFT changes the model that it wraps.
        peft = LlamaForCausalLM.from_pretrained(base).eval()
        self.mixed = PeftModel.from_pretrained(peft, adapters[0], adapter_name=adapters[0].name)
        for path in adapters[1:]:
            self.mixed.load_adapter(path, adapter_name=path.name)
        self.mixed.eval()
        self.names = [path.name for path in adapters]

    @torch.no_grad()
    def run(self, prompts: list[list[int]], steps: int, mixed: bool) -> None:
        model: Any = self.mixed if mixed else self.base
        options: dict[str, Any] = {"adapter_names": self.names[: len(prompts)]} if mixed else {}
        ids = torch.tensor(prompts)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **options)
        for _ in range(steps - 1):
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(
                input_ids=ids, past_key_values=out.past_key_values, use_cache=True, **options
            )


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--make-only", type=Path, metavar="DIR", help="keep a checkpoint there, measure nothing"
    )
    options = parser.parse_args()
    if options.make_only:
        make_checkpoint(options.make_only)
        return 0
    torch.set_num_threads(options.threads)
    before = os.getloadavg()[0]  # of the machine: over 0 means that others ran beside this
    random = torch.Generator().manual_seed(1)

    def prompts(rows: int, length: int) -> list[list[int]]:
        ids: list[list[int]] = torch.randint(2, 32000, (rows, length), generator=random).tolist()
        return ids

    shapes = {
        "prefill 512": (prompts(1, PREFILL), 1, False),
        "decode batch 8": (prompts(BATCH, CONTEXT), STEPS, False),
        "prefill 8x64, 8 adapters": (prompts(BATCH, PREFILL // BATCH), 1, True),
        "decode batch 8, 8 adapters": (prompts(BATCH, CONTEXT), STEPS, True),
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base, adapters = make_checkpoint(Path(scratch))
        theirs = Theirs(base, adapters)
        engines = {
            dtype: Ours(base, adapters, options.threads, dtype) for dtype in ("float32", "bfloat16")
        }
        backend = engines["float32"].engine.backend_name
        runs: dict[str, Any] = {"theirs": theirs, **engines}
        for name, (rows, steps, mixed) in shapes.items():
            seconds: dict[str, list[float]] = {key: [] for key in runs}
            for repeat in range(options.repeats + 1):  # the first warms up
                for key, runner in runs.items():
                    took = timed(lambda r=runner, p=rows, s=steps, m=mixed: r.run(p, s, m))
                    if repeat:
                        seconds[key].append(took)
            tokens = sum(map(len, rows)) if steps == 1 else len(rows) * steps
            median = {key: statistics.median(values) for key, values in seconds.items()}
            results[name] = {
                "tokens": tokens,
                "tokens_per_s": {key: round(tokens / value, 1) for key, value in median.items()},
                "ratio_to_theirs": {
                    key: round(median["theirs"] / median[key], 3) for key in engines
                },
                "spread": {key: round(max(v) / min(v), 3) for key, v in seconds.items()},
            }
            print(name, json.dumps(results[name]), flush=True)
        for ours in engines.values():
            ours.engine.close()
    report = {
        "what": "engine beside transformers f32 (base) and PEFT f32 (mixed), interleaved medians",
        "backend": backend,
        "threads": options.threads,
        "repeats": options.repeats,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": sys.version.split()[0]},
        "load_average": {"before": before, "after": os.getloadavg()[0]},
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "results": results,
    }
    text = json.dumps(report, indent=1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
