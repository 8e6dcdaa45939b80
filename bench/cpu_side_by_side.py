"""The CPU engine beside llama.cpp and PEFT on the same random checkpoints, interleaved.

    python bench/cpu_side_by_side.py --llama BUILD_DIR [--sizes 120m,1b] [--isa x86-64-v3]
        [--activation-dtype bfloat16] [--repeats 5] [--only ROWS] [--work DIR] [--out FILE]

Every row is timed in rounds: ours, then each peer, then ours once more (the second time is the
noise floor: what a ratio of a thing to itself comes to). Medians over the rounds, of tokens/s and
of each round's ratio: what changes for minutes changes both sides of it. Ours: bfloat16 weights and
adapters, float32 sums and KV cache, and float32 activations unless told otherwise. docs/speed.md
says how to get a build of llama.cpp.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llama_cpp import LlamaCpp, LlamaServer
from measured_on import measured_on
from peft_mixed import PeftMixed
from random_llama import SHAPES, VOCAB, make_checkpoint

from loraserve import Engine, EngineConfig, SamplingParams, _testing

Run = Callable[[], float]  # tokens/s of one round
OURS = "ours"
CONTEXT = 8  # tokens before a decoded one, where context is not the point


class Ours:
    """The engine with nothing cached between calls."""

    def __init__(self, base: Path, adapters: list[Path], options: argparse.Namespace) -> None:
        self.engine = Engine(
            EngineConfig(
                model=base,
                weight_dtype="bfloat16",
                adapter_dtype="bfloat16",
                activation_dtype=options.activation_dtype,
                threads=options.threads,
                isa=options.isa,
                prefix_cache=False,
                record_steps=True,
                memory_bytes=2200 << 20,
            )
        )
        for path in adapters:
            self.engine.load_adapter(path.name, path)
        self.names = [path.name for path in adapters]
        self._random = torch.Generator().manual_seed(1)

    def _prompts(self, rows: int, length: int) -> list[list[int]]:
        size = (rows, length)
        ids: list[list[int]] = torch.randint(300, VOCAB, size, generator=self._random).tolist()
        return ids

    def _generate(self, rows: int, length: int, steps: int, adapters: list[str | None]) -> float:
        params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
        prompts = self._prompts(rows, length)
        begin = time.perf_counter()
        self.engine.generate(prompts, params, adapters)
        return time.perf_counter() - begin

    def _adapters(self, rows: int, which: str) -> list[str | None]:
        if which == "base":
            return [None] * rows
        if which == "low":
            return [self.names[0]] * rows
        return [self.names[row % len(self.names)] for row in range(rows)]

    def prefill(self, rows: int, length: int, which: str = "base") -> float:
        return rows * length / self._generate(rows, length, 1, self._adapters(rows, which))

    def decode(self, rows: int, context: int, steps: int, which: str = "base") -> float:
        """From the engine's records of the steps that only decode, all rows together."""
        self.engine.take_step_records()
        # The first rows decode while the last are still in prefill.
        apart = rows * context // self.engine.config.max_batch_tokens
        self._generate(rows, context, steps + apart + 1, self._adapters(rows, which))
        time.sleep(0.05)  # the last step's record comes after its tokens
        taken = self.engine.take_step_records()
        records = [r for r in taken if r.decode_tokens == rows and not r.prefill_tokens]
        if not records:
            raise RuntimeError(f"{rows} rows after {context} tokens never decoded together")
        return rows * len(records) / sum(record.seconds for record in records)

    def outside_steps(self, rows: int, steps: int) -> float:
        """The share of a decode's time that passes outside the engine's steps, in percent."""
        self.engine.take_step_records()
        wall = self._generate(rows, CONTEXT, steps, self._adapters(rows, "base"))
        time.sleep(0.05)
        inside = sum(record.seconds for record in self.engine.take_step_records())
        return 100 * max(0.0, 1 - inside / wall)

    def whole(self, rows: int, prompt: int, steps: int, which: str) -> float:
        """Generated tokens/s with prompts included, as a server's clients see it."""
        return rows * steps / self._generate(rows, prompt, steps, self._adapters(rows, which))


class Rows:
    """The table of one size. Only rows whose names hold `only`."""

    def __init__(self, size: str, options: argparse.Namespace) -> None:
        self.size = size
        self.repeats = options.repeats
        self.only = options.only
        # Large models decode fewer steps: a round is seconds.
        self.few = {"120m": 32, "1b": 6}.get(size, 8)
        self.found: dict[str, Any] = {}

    def wants(self, name: str) -> bool:
        return self.only in name

    def add(self, name: str, runs: dict[str, Run]) -> None:
        """Measures in rounds, after one of our own that does not count."""
        if not self.wants(name):
            return
        for key in runs:
            if not key.startswith(("llama", "PEFT")):
                runs[key]()
        samples: dict[str, list[float]] = {key: [] for key in runs}
        again: list[float] = []
        for _ in range(self.repeats):
            for key, run in runs.items():
                samples[key].append(run())
            again.append(runs[OURS]())

        def ratio(theirs: list[float]) -> float:
            return statistics.median(a / b for a, b in zip(samples[OURS], theirs, strict=True))

        noise = ratio(again)
        row = {
            "tokens_per_s": {k: round(statistics.median(v), 2) for k, v in samples.items()},
            "ratio": {k: round(ratio(v), 3) for k, v in samples.items() if k != OURS},
            "noise": round(max(noise, 1 / noise), 3),
            "spread": {k: round(max(v) / min(v), 3) for k, v in samples.items()},
            "samples": {k: [round(x, 2) for x in v] for k, v in samples.items()},
        }
        print(self.size, name, json.dumps(row), flush=True)
        self.found[name] = row


def base_rows(rows: Rows, ours: Ours, llama: LlamaCpp, ggufs: dict[str, Path]) -> None:
    """Without adapters, against llama.cpp."""

    def row(name: str, dtypes: list[str], own: Run, theirs: Callable[[Path], float]) -> None:
        peers: dict[str, Run] = {
            f"llama.cpp {dtype}": lambda dtype=dtype: theirs(ggufs[dtype])  # type: ignore[misc]
            for dtype in dtypes
        }
        rows.add(name, {OURS: own} | peers)

    every = list(ggufs)
    half = [dtype for dtype in every if dtype != "f32"]
    row("prefill 512", every, lambda: ours.prefill(1, 512), lambda m: llama.prefill(m, 512))
    for batch, steps in ((1, 2 * rows.few), (8, rows.few), (32, rows.few)):
        row(
            f"decode batch {batch}",
            half,
            lambda b=batch, s=steps: ours.decode(b, CONTEXT, s),  # type: ignore[misc]
            lambda m, b=batch, s=steps: llama.decode(m, b, CONTEXT, s),  # type: ignore[misc]
        )
    if rows.size != "1b":  # minutes a round there
        row(
            "prefill 2048",
            ["bf16"],
            lambda: ours.prefill(1, 2048),
            lambda m: llama.prefill(m, 2048),
        )
        row(
            "decode batch 8 at 2k context",
            ["bf16"],
            lambda: ours.decode(8, 2040, 8),
            lambda m: llama.decode(m, 8, 2040, 8),
        )


def adapter_rows(rows: Rows, ours: Ours, peft: PeftMixed | None) -> None:
    """What mixed ranks cost over our own base, and PEFT's mixed batch."""
    few = rows.few
    for batch in (8, 32):
        runs: dict[str, Run] = {
            OURS: lambda b=batch: ours.decode(b, CONTEXT, few, "mixed"),  # type: ignore[misc]
            "our base": lambda b=batch: ours.decode(b, CONTEXT, few),  # type: ignore[misc]
            "ours, rank 8 only": lambda b=batch: ours.decode(b, CONTEXT, few, "low"),  # type: ignore[misc]
        }
        if peft is not None:
            runs["PEFT f32"] = lambda b=batch: peft.decode(b, CONTEXT, 4)  # type: ignore[misc]
        rows.add(f"mixed decode batch {batch}", runs)
    rows.add(
        "mixed prefill 8x64",
        {OURS: lambda: ours.prefill(8, 64, "mixed"), "our base": lambda: ours.prefill(8, 64)},
    )


def merely_loaded(rows: Rows, ours: Ours, alone: Ours) -> None:
    """Rank-8 requests in an engine that holds all adapters, and in one that holds theirs alone."""
    rows.add(
        "rank 8 only, rank 128 merely loaded",
        {
            OURS: lambda: ours.decode(8, CONTEXT, rows.few, "low"),
            "rank 128 not loaded": lambda: alone.decode(8, CONTEXT, rows.few, "low"),
        },
    )


def bandwidth(ours: Ours, size: str, threads: int, repeats: int) -> dict[str, float]:
    """Bytes of weights that decoding one sequence reads, beside a loop that only reads."""
    step_bytes = SHAPES[size].step_bytes()
    found = [
        (1e-9 * step_bytes * ours.decode(1, CONTEXT, 64), _testing.read_gbytes_per_s(threads))
        for _ in range(repeats)
    ]
    return {
        "weights_gbytes_per_s": round(statistics.median(used for used, _ in found), 2),
        "read_gbytes_per_s": round(statistics.median(read for _, read in found), 2),
        "share": round(statistics.median(used / read for used, read in found), 3),
    }


def attention_share(ours: Ours, repeats: int) -> dict[str, float]:
    """Of a step, in percent: what the same rows save where there is next to no context. Prefill is
    beside the same tokens in 64 prompts, which have 63 more rows of logits: a little too low."""

    def share(long: Run, short: Run) -> float:
        pairs = [(long(), short()) for _ in range(repeats)]
        return round(100 * statistics.median(1 - slow / fast for slow, fast in pairs), 1)

    return {
        "decode batch 8 at 2k context": share(
            lambda: ours.decode(8, 2040, 8), lambda: ours.decode(8, CONTEXT, 16)
        ),
        "prefill 2048": share(lambda: ours.prefill(1, 2048), lambda: ours.prefill(64, 32)),
    }


def server_rows(rows: Rows, ours: Ours, server: LlamaServer) -> None:
    steps = {"120m": 128, "1b": 48}.get(rows.size, 16)
    rows.add(
        f"8 requests on 8 adapters, {steps} tokens",
        {
            OURS: lambda: ours.whole(8, 32, steps, "mixed"),
            "llama-server f16": lambda: server.generate(8, 32, steps, lambda index: index % 8),
            "llama-server f16, no adapter": lambda: server.generate(
                8, 32, steps, lambda index: None
            ),
        },
    )


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| | ours | peers, tokens/s (ours to theirs) | ours to itself |",
        "|---|---|---|---|",
    ]
    for size, rows in report["results"].items():
        for name, row in rows.items():
            if "ratio" not in row:
                continue
            speeds = row["tokens_per_s"]
            peers = ", ".join(
                f"{peer} {speeds[peer]:.1f} ({ratio:.2f}x)" for peer, ratio in row["ratio"].items()
            )
            lines.append(f"| {size} {name} | {speeds[OURS]:.1f} | {peers} | {row['noise']:.2f} |")
    return "\n".join(lines) + "\n"


def measure(options: argparse.Namespace, size: str, root: Path) -> dict[str, Any]:
    base, adapters = make_checkpoint(root, size)
    llama = LlamaCpp(options.llama, options.threads) if options.llama else None
    ours = Ours(base, adapters, options)
    rows = Rows(size, options)
    if llama is not None:
        dtypes = ("bf16", "f16", "f32")
        ggufs = {d: llama.convert(base, d, root / f"base-{d}.gguf") for d in dtypes}
        loras = [llama.convert_adapter(base, a, root / f"{a.name}.gguf") for a in adapters]
        base_rows(rows, ours, llama, ggufs)
        server = LlamaServer(llama, ggufs["f16"], loras, slots=8, context=512)
        try:
            server_rows(rows, ours, server)
        finally:
            server.close()
    peft = None if options.no_peft else PeftMixed(base, adapters, options.threads)
    adapter_rows(rows, ours, peft)
    del peft  # its memory
    alone = Ours(base, adapters[:1], options)
    merely_loaded(rows, ours, alone)
    alone.engine.close()
    found = rows.found
    if size != "1b" and rows.wants("attention's share"):
        found["attention's share"] = {"percent_of_step": attention_share(ours, options.repeats)}
    if rows.wants("decode batch 1, bandwidth"):
        found["decode batch 1, bandwidth"] = bandwidth(ours, size, options.threads, options.repeats)
    if rows.wants("outside steps, decode batch 32"):
        found["outside steps, decode batch 32"] = {"percent": round(ours.outside_steps(32, 24), 2)}
    ours.engine.close()
    return found


# What keeps PyTorch and its libraries to the instructions that ours is told to use.
TORCH_LIMITS = {
    "x86-64-v3": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
}


def limit_torch(isa: str) -> None:
    """Starts this program anew if need be: the libraries look when they are loaded."""
    limits = TORCH_LIMITS.get(isa, {})
    if any(os.environ.get(name) != value for name, value in limits.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | limits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama", type=Path, help="a build directory; without it no llama.cpp")
    parser.add_argument("--sizes", default="120m,1b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--isa", default="", choices=("", *TORCH_LIMITS), help="the highest that ours and PEFT use"
    )
    parser.add_argument(
        "--activation-dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="ours"
    )
    parser.add_argument("--only", default="", help="rows whose names hold this")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--work", type=Path, help="keeps checkpoints and GGUF files there")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    limit_torch(options.isa)
    report: dict[str, Any] = measured_on()
    report |= {"isa": options.isa or "native", "threads": options.threads}
    report |= {"activation_dtype": options.activation_dtype}
    report["peers"] = {name: version(name) for name in ("torch", "transformers", "peft")}
    if options.llama:
        report["peers"]["llama.cpp"] = LlamaCpp(options.llama, options.threads).made_with()
    report |= {"repeats": options.repeats, "results": {}}
    with tempfile.TemporaryDirectory() as scratch:
        root = options.work or Path(scratch)
        for size in options.sizes.split(","):
            report["results"][size] = measure(options, size, root / size)
    report["load_average_after"] = os.getloadavg()
    print(table(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.table:
        options.table.write_text(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
