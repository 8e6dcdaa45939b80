"""What loading adapters costs those who decode: the time between tokens with 0, 1, 4 and 16 loads.

    python bench/installs_beside_decode.py [--seconds S] [--rounds N] [--mib 16 256] [--out FILE]

One engine of one thread, so one core of two is left to loading. Some requests decode all the time,
their tokens read as a node reads them, by one event loop. Beside them so many threads load an
adapter each: the file mapped, every chunk checked, the weights checked to be finite, then written
into pages in the place of others; then it is unloaded and the next is loaded, without a pause.
Every window with loads follows one without, and a ratio is the median over rounds of a window's
percentile by that of the one before it, so what changes slowly on the machine cancels out. Numbers
of one machine, which should have nothing else to do.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from measured_on import measured_on
from random_model import Shape, random_adapter, write_model

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.checkpoint.packed_adapter import write_packed

SHAPE = Shape()
CONCURRENT = (1, 4, 16)
TAILS = (50, 95, 99)
SEQUENCES = 4
FILES = 4  # of each size; the threads share them


class Loads:
    """So many threads that load and unload until told to stop."""

    def __init__(self, engine: Engine, paths: list[Path], count: int) -> None:
        self.engine, self.paths = engine, paths
        self.stop = threading.Event()
        self.done = 0
        self.error: BaseException | None = None
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]

    def __enter__(self) -> "Loads":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _run(self, index: int) -> None:
        name = f"load-{index}"
        path = self.paths[index % len(self.paths)]
        try:
            while not self.stop.is_set():
                self.engine.load_adapter(name, path)
                for poll in itertools.count():
                    if poll % 10 == 0:
                        self.engine.prefetch(name)  # forgotten where there is no room now
                    if name in self.engine.installed() or self.stop.wait(0.02):
                        break
                self.done += not self.stop.is_set()
                self.engine.unload_adapter(name)
        except BaseException as error:
            self.error = error


class Decoding:
    """Requests that decode all the time; the gaps between their tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.gaps: list[float] = []

    async def one(self, seed: int, end: float) -> None:
        params = SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True)
        prompt = [(seed * 131 + i) % SHAPE.vocabulary for i in range(32)]
        last = 0.0
        async for chunk in self.engine.stream(prompt, params):
            now = time.perf_counter()
            if last:
                self.gaps += [(now - last) / len(chunk.token_ids)] * len(chunk.token_ids)
            last = now
            if now >= end:
                return

    def run(self, seconds: float) -> list[float]:
        self.gaps = []
        end = time.perf_counter() + seconds

        async def all_of_them() -> None:
            await asyncio.gather(*(self.one(seed, end) for seed in range(SEQUENCES)))

        asyncio.run(all_of_them())
        return self.gaps


@dataclass
class Windows:
    """Of one number of loads: all gaps, and each window beside the one without loads before it."""

    gaps: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    loads: int = 0
    seconds: float = 0.0

    def add(self, loaded: dict[str, float], alone: dict[str, float]) -> None:
        for name, value in loaded.items():
            self.ratios.setdefault(f"{name}_ratio", []).append(value / alone[name])

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": len(self.gaps),
            **{f"tbt_p{q}_ms": round(1e3 * float(np.percentile(self.gaps, q)), 3) for q in TAILS},
            "tbt_max_ms": round(1e3 * max(self.gaps), 3),
            **{name: round(float(np.median(values)), 3) for name, values in self.ratios.items()},
            "loads": self.loads,
            "loads_per_s": round(self.loads / self.seconds, 2) if self.seconds else 0.0,
        }


def measured(
    engine: Engine, paths: list[Path], rounds: int, seconds: float
) -> dict[str, dict[str, Any]]:
    windows = {count: Windows() for count in (0, *CONCURRENT)}
    decoding = Decoding(engine)
    decoding.run(1.0)

    def window(count: int) -> dict[str, float]:
        engine.take_step_records()
        gaps = decoding.run(seconds)
        windows[count].gaps += gaps
        steps = [r.seconds for r in engine.take_step_records() if r.decode_tokens == SEQUENCES]
        found = {f"tbt_p{q}": float(np.percentile(gaps, q)) for q in TAILS}
        return {**found, "step_p95": float(np.percentile(steps, 95))}

    for _ in range(rounds):
        for count in CONCURRENT:
            alone = window(0)
            with Loads(engine, paths, count) as loading:
                begin = time.perf_counter()
                windows[count].add(window(count), alone)
                windows[count].loads += loading.done
                windows[count].seconds += time.perf_counter() - begin
    return {str(count): one.summary() for count, one in windows.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=float, nargs="+", default=[16, 256])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {**measured_on(), "sequences": SEQUENCES, "sizes": {}}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_model(SHAPE, root / "model")
        config = EngineConfig(
            model=root / "model",
            weight_dtype="bfloat16",
            memory_bytes=3 << 29,
            threads=1,
            prefix_cache=False,
            record_steps=True,
        )
        with Engine(config) as engine:
            for mib in given.mib:
                paths = [root / f"{mib:g}-{seed}.lora" for seed in range(FILES)]
                for seed, path in enumerate(paths):
                    write_packed(random_adapter(SHAPE, mib, seed), path)
                found = measured(engine, paths, given.rounds, given.seconds)
                result["sizes"][f"{mib:g} MiB"] = found
                for path in paths:
                    path.unlink()
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
