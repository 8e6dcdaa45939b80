"""Our LoRA operation alone: mixed ranks, numbers of adapters, batches, and who asks for which.

    python bench/gpu_lora.py [--device cuda] [--model llama-2-7b] [--layers 8] [--repeats N]
        [--gb-per-s B] [--budget S] [--out FILE]
        [--peers vllm,sglang --peer-sources DIR [--peer-budget S]]

A step's LoRA over all seven modules of some layers, one token for each sequence, as a decode step
does it (with CUDA graphs), from its launch until the host has seen its end; what caches hold is
overwritten before each. For every batch, number of adapters and popularity there are:

- `ms` (the median of some) and `net_ms`, less what a step without any adapter takes, which is
  launching and waiting alone;
- `needed_bytes`: of the distinct adapters' weights at their own ranks, as the backend counts them;
- `gb_per_s` and `to_floor`: net time by the time those bytes, and those of the activations, take
  at the bandwidth of a copy measured on the device (or given);
- `to_padded`: how many times longer the same adapters take at rank 128;
- for mixed ranks `to_homogeneous`: by the mean over its adapters of the time that as many adapters
  all of that one's rank take.

Numbers are of the layers given, not of a model's 32. With `--peers`, the Triton kernels of vLLM and
of SGLang (csgmv) do the same (lora_peers.py says where their sources are expected and how they are
run and tuned): of mixed ranks, of rank 8 in a pool made for 8, and of 128. `to_ours` is by our
time. Their launches come as one graph, as ours do.
`--tiny` is a small run on any device, to see that the script works: its numbers mean nothing.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_model import RANKS, Ceilings, ceilings, shape_of
from lora_peers import PEERS, Pool, Timed, open_peer
from measured_on import measured_on
from random_model import Shape

from loraserve import _testing
from loraserve.checkpoint.adapter_source import MODULES

POPULARITIES = ("same", "uniform", "zipf")
MIXED = "mixed"


@dataclass(frozen=True)
class Sweep:
    layers: int
    batches: tuple[int, ...] = (1, 16, 64, 256)
    adapters: tuple[int, ...] = (1, 4, 16, 64)
    ranks: tuple[int, ...] = RANKS
    repeats: int = 25
    page_bytes: int = 1 << 17  # as the engine takes for Llama-2-7B
    flush_bytes: int = 256 << 20  # several times an H200's L2


TINY = Sweep(2, (1, 5), (1, 3), (8, 24, 40), 2, 1 << 14, 0)


def asked(batch: int, adapters: int, popularity: str) -> list[int]:
    """Which adapter each sequence asks for, in order of adapters."""
    if popularity == "same":
        return [0] * batch
    if popularity == "uniform":
        return sorted(i % adapters for i in range(batch))
    weights = 1 / np.arange(1, adapters + 1)
    rng = np.random.default_rng(batch * adapters)
    return sorted(int(i) for i in rng.choice(adapters, batch, p=weights / weights.sum()))


def rank_of(sweep: Sweep, adapter: int, rank: int | str) -> int:
    """Of an adapter of those that all have `rank`, or of the mixed ones."""
    return sweep.ranks[adapter % len(sweep.ranks)] if rank == MIXED else int(rank)


class Measured:
    """One device with adapters of all ranks in its pages."""

    def __init__(self, device: str, shape: Shape, sweep: Sweep) -> None:
        self._sweep = sweep
        self._shapes = [shape.modules()[name] for name in MODULES]
        self._most = max(sweep.adapters)
        ranks = [rank for rank in sweep.ranks for _ in range(self._most)]
        self._lora = _testing.LoraSpeed(
            device,
            sweep.layers,
            self._shapes,
            ranks,
            (max(sweep.batches) + 31) // 32 * 32,  # rows are padded to those of a graph
            sweep.page_bytes,
            sweep.flush_bytes,
        )
        self.name = self._lora.name
        self._bytes = self._lora.weight_bytes()

    def installed(self, adapter: int, rank: int | str) -> int:
        """Of the `adapter`-th of those that all have a rank, or the mixed ones."""
        return self._sweep.ranks.index(rank_of(self._sweep, adapter, rank)) * self._most + adapter

    def needed_bytes(self, chosen: list[int], rank: int | str) -> int:
        return sum(self._bytes[self.installed(a, rank)] for a in set(chosen))

    def activation_bytes(self, rows: int) -> int:
        """x read once for each group of modules, y read and written."""
        inputs = sum(self._shapes[first][0] for first in (0, 3, 4, 6))
        outputs = sum(out for _, out in self._shapes)
        return 2 * rows * (inputs + 2 * outputs) * self._sweep.layers

    def seconds(self, rows: int, chosen: list[int], rank: int | str) -> float:
        segments, row = [], 0
        for adapter, count in sorted(Counter(chosen).items()):
            segments.append((row, count, self.installed(adapter, rank)))
            row += count
        # Two come before: the first step of a kind is run as it is, the second is recorded.
        times = self._lora.run(rows, segments, self._sweep.repeats + 2)[2:]
        return float(np.median(times))


def points(sweep: Sweep) -> list[tuple[int, int, str]]:
    """(batch, adapters, popularity), none twice: the most telling first, if time should run out."""
    found = []
    for batch in sorted(sweep.batches, key=lambda b: (b != 64, b)):
        for adapters in sorted(sweep.adapters, reverse=True):
            for popularity in POPULARITIES:
                if (popularity == "same") == (adapters == 1) and adapters <= batch:
                    found.append((batch, adapters, popularity))
    return found


def measured(device: str, shape: Shape, sweep: Sweep, most: Ceilings, budget: float) -> Any:
    end = time.monotonic() + budget
    bench = Measured(device, shape, sweep)
    empty = {batch: bench.seconds(batch, [], MIXED) for batch in sweep.batches}
    rows: list[dict[str, Any]] = []
    left_out = 0
    for batch, adapters, popularity in points(sweep):
        if time.monotonic() > end:
            left_out += 1
            continue
        chosen = asked(batch, adapters, popularity)
        net: dict[int | str, float] = {}
        ranks: list[int | str] = [*sweep.ranks]
        for rank in ranks if adapters == 1 else [*ranks, MIXED]:
            seconds = bench.seconds(batch, chosen, rank)
            net[rank] = max(seconds - empty[batch], 1e-9)
            needed = bench.needed_bytes(chosen, rank)
            floor = (needed + bench.activation_bytes(batch)) / most.gb_per_s / 1e9
            row: dict[str, Any] = {
                "batch": batch,
                "adapters": adapters,
                "distinct": len(set(chosen)),
                "popularity": popularity,
                "rank": rank,
                "ms": round(1e3 * seconds, 5),
                "net_ms": round(1e3 * net[rank], 5),
                "needed_bytes": needed,
                "gb_per_s": round(needed / net[rank] / 1e9, 2),
                "to_floor": round(net[rank] / floor, 3),
            }
            if rank == MIXED:
                alone = [net[rank_of(sweep, a, MIXED)] for a in sorted(set(chosen))]
                row["to_homogeneous"] = round(net[rank] / float(np.mean(alone)), 3)
            rows.append(row)
        padded = net[max(sweep.ranks)]
        for row in rows[-len(net) :]:
            row["to_padded"] = round(padded / net[row["rank"]], 3)
    return {
        "backend": bench.name,
        "layers": sweep.layers,
        "empty_ms": {batch: round(1e3 * seconds, 5) for batch, seconds in empty.items()},
        "points_left_out_for_time": left_out,
        "points": rows,
    }


def peer_points(
    name: str, sources: Path, shape: Shape, sweep: Sweep, ours: list[dict[str, Any]], end: float
) -> dict[str, Any]:
    """The points that a peer found time for. Raises what torch, Triton or the kernels raise."""
    import torch

    shapes = [shape.modules()[module] for module in MODULES]
    most = max(sweep.adapters)
    known = {(p["batch"], p["adapters"], p["popularity"], p["rank"]): p["ms"] for p in ours}
    rows: list[dict[str, Any]] = []
    left_out = 0
    tuned: dict[str, Any] = {}
    wanted: list[int | str] = [MIXED, max(sweep.ranks), min(sweep.ranks)]
    for rank in wanted:
        ranks = [rank_of(sweep, i, rank) for i in range(most)]
        pool = Pool.random(torch, "cuda", sweep.layers, shapes, ranks)
        peer = open_peer(name, sources, pool)
        timed = Timed(peer, shapes, sweep.layers, max(sweep.flush_bytes, 1))
        timed.tune(asked(64, most, "uniform"), 5, time.monotonic() + (end - time.monotonic()) / 4)
        tuned[str(rank)] = {f"{op} {group}": c for (op, group), c in timed.tuned.items()}
        for batch, adapters, popularity in points(sweep):
            key = (batch, adapters, popularity, rank)
            if key not in known or popularity == "zipf":
                continue
            if time.monotonic() > end:
                left_out += 1
                continue
            ms = 1e3 * timed.seconds(asked(batch, adapters, popularity), sweep.repeats)
            names = ("batch", "adapters", "popularity", "rank")
            row: dict[str, Any] = dict(zip(names, key, strict=True))
            rows.append({**row, "ms": round(ms, 5), "to_ours": round(ms / known[key], 3)})
        del pool, peer, timed
        torch.cuda.empty_cache()
    return {"points": rows, "points_left_out_for_time": left_out, "tried_and_kept": tuned}


def beside_peers(given: argparse.Namespace, shape: Shape, sweep: Sweep, ours: Any) -> Any:
    """By the peer's name; what keeps one from being measured is told, and no other suffers."""
    found: dict[str, Any] = {}
    names = [name for name in given.peers.split(",") if name]
    for name in names:
        end = time.monotonic() + given.peer_budget / len(names)
        try:
            found[name] = peer_points(name, given.peer_sources, shape, sweep, ours["points"], end)
        except Exception as error:  # of other projects' code: anything may come
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found or "none asked for"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="llama-2-7b", help="of gpu_model.SHAPES")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=Sweep(1).repeats)
    parser.add_argument("--gb-per-s", type=float, help="of a copy, instead of measuring it")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds; then points are left")
    parser.add_argument("--peers", default="", help=f"of {', '.join(PEERS)}, with commas")
    parser.add_argument("--peer-sources", type=Path, default=Path("build/gpu_peers"))
    parser.add_argument("--peer-budget", type=float, default=120.0, help="seconds, all together")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    about = measured_on()
    sweep = TINY if given.tiny else Sweep(given.layers, repeats=given.repeats)
    model = "tiny" if given.tiny else given.model
    most = Ceilings(given.gb_per_s, None, "given") if given.gb_per_s else ceilings(given.device)
    shape = shape_of(model, sweep.layers)
    found = measured(given.device, shape, sweep, most, given.budget)
    head = {**about, "tiny": given.tiny, "model": model, "ceilings": asdict(most)}
    report = {**head, **found, "peers": "not finished"}

    def write() -> str:
        text = json.dumps(report, indent=1)
        if given.out:
            given.out.write_text(text + "\n")
        return text

    write()
    report["peers"] = beside_peers(given, shape, sweep, found)
    print(write())
    return 0


if __name__ == "__main__":
    sys.exit(main())
