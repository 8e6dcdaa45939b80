"""What a GPU makes of the host pool: copies from page-locked memory, installs, decoding beside.

    python bench/gpu_pool.py [--device cuda] [--mib 256] [--seconds S] [--rounds N] [--out FILE]

Three things, as one JSON object:

- `copies`: bandwidth from host memory to the device, of the pool's page-locked memory and of
  pageable memory, the shortest of some.
- `installs`: seconds that an adapter takes into pages while nobody decodes, from the page-locked
  pool (the device reads it directly) and from pageable memory (a copy more), per MiB of packed
  bytes: copy and kernel together, as they overlap.
- `decode`: time between tokens of running requests while adapters of that size are installed from
  the pool without a pause, and without; ratios are medians over pairs of windows.

`--tiny` is a small run on any device, to see that the script works: its numbers mean nothing.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from measured_on import measured_on
from random_model import Shape, random_adapter, write_model

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.checkpoint.packed_adapter import PackedAdapter, pack, parse_packed
from loraserve.engine.device_staging import DeviceStaging
from loraserve.node.pool.arena import PAGE_BYTES, HostArena

TINY = Shape(vocabulary=64, hidden=64, layers=2, heads=4, kv_heads=2, intermediate=96)
TIMES = 5
TAILS = (50, 95, 99)
SEQUENCES = 8
TIMEOUT_S = 300.0


def copies(device: str, pinned: memoryview) -> dict[str, Any]:
    """Of all of `pinned`, which an engine has registered, and of as much pageable memory."""
    staging = DeviceStaging(device, pinned.nbytes)
    pageable = memoryview(bytearray(pinned.nbytes))
    np.frombuffer(pageable, np.uint8)[:] = 1  # its pages are there
    found: dict[str, Any] = {"bytes": pinned.nbytes}
    for name, host in (("pinned", pinned), ("pageable", pageable)):
        shortest = float("inf")
        for _ in range(TIMES):
            begun = time.perf_counter()
            staging.copy_from_host(0, host)
            shortest = min(shortest, time.perf_counter() - begun)
        found[f"{name}_gb_per_s"] = round(pinned.nbytes / shortest / 1e9, 3)
    found["pinned_to_pageable"] = round(found["pinned_gb_per_s"] / found["pageable_gb_per_s"], 3)
    return found


def installed(engine: Engine, name: str, packed: PackedAdapter, stop: threading.Event) -> bool:
    """Loads it and waits until it is in pages; False where it was told to stop."""
    end = time.monotonic() + TIMEOUT_S
    engine.load_adapter(name, packed)
    engine.prefetch(name)
    for polls in range(1, 1 << 30):
        if name in engine.installed():
            return True
        if stop.wait(0.001):
            return False
        if polls % 100 == 0:
            engine.prefetch(name)  # forgotten where there was no room
            if time.monotonic() > end:
                raise TimeoutError(f"{name} is not in pages after {TIMEOUT_S} s")
    return False


def installs(engine: Engine, sources: dict[str, PackedAdapter]) -> dict[str, Any]:
    """By where the packed bytes are."""
    found: dict[str, Any] = {}
    never = threading.Event()
    for where, packed in sources.items():
        shortest = float("inf")
        before = engine.stats()
        for _ in range(TIMES):
            seconds = engine.stats().adapter_install_seconds
            installed(engine, where, packed, never)
            shortest = min(shortest, engine.stats().adapter_install_seconds - seconds)
            engine.unload_adapter(where)
        after = engine.stats()
        mib = packed.size_bytes / (1 << 20)
        found[where] = {
            "packed_bytes": packed.size_bytes,
            "install_ms": round(1e3 * shortest, 3),
            "install_ms_per_mib": round(1e3 * shortest / mib, 4),
            "read_directly_bytes": after.adapter_direct_bytes - before.adapter_direct_bytes,
            "staged_bytes": after.adapter_staged_bytes - before.adapter_staged_bytes,
        }
    return found


class Loads:
    """A thread that installs an adapter and lets it go again until told to stop."""

    def __init__(self, engine: Engine, packed: PackedAdapter) -> None:
        self._engine, self._packed = engine, packed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None
        self.done = 0

    def __enter__(self) -> "Loads":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.done += installed(self._engine, "load", self._packed, self._stop)
                self._engine.unload_adapter("load")
        except BaseException as error:
            self._error = error


def gaps(engine: Engine, shape: Shape, seconds: float) -> list[float]:
    """Seconds between tokens of requests that decode for so long, at least one of each."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    params = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)

    async def one(seed: int) -> None:
        prompt = [(seed * 131 + i) % shape.vocabulary for i in range(8)]
        own = 0
        while time.perf_counter() < end or not own:
            last = 0.0
            async for chunk in engine.stream(prompt, params):
                now = time.perf_counter()
                if last:
                    own += len(chunk.token_ids)
                    found.extend([(now - last) / len(chunk.token_ids)] * len(chunk.token_ids))
                last = now
                if now >= end and own:
                    return

    async def all_of_them() -> None:
        await asyncio.gather(*(one(seed) for seed in range(SEQUENCES)))

    asyncio.run(all_of_them())
    return found


def decode(
    engine: Engine, shape: Shape, packed: PackedAdapter, rounds: int, seconds: float
) -> dict[str, Any]:
    gaps(engine, shape, seconds / 4)  # graphs and the like
    alone: list[float] = []
    beside: list[float] = []
    ratios: dict[int, list[float]] = {q: [] for q in TAILS}
    done = 0
    for _ in range(rounds):
        quiet = gaps(engine, shape, seconds)
        with Loads(engine, packed) as loads:
            busy = gaps(engine, shape, seconds)
        alone += quiet
        beside += busy
        done += loads.done
        for q in TAILS:
            ratios[q].append(float(np.percentile(busy, q) / np.percentile(quiet, q)))

    def tails(values: list[float]) -> dict[str, float]:
        return {f"tbt_p{q}_ms": round(1e3 * float(np.percentile(values, q)), 3) for q in TAILS}

    return {
        "sequences": SEQUENCES,
        "alone": {"tokens": len(alone), **tails(alone)},
        "beside_installs": {"tokens": len(beside), "installs": done, **tails(beside)},
        "ratios": {f"tbt_p{q}": round(float(np.median(r)), 3) for q, r in ratios.items()},
    }


def measured(
    device: str, shape: Shape, mib: float, memory_bytes: int, rounds: int, seconds: float
) -> dict[str, Any]:
    blob = pack(random_adapter(shape, mib, 1))
    arena = HostArena(len(blob) + PAGE_BYTES)
    slot = arena.view(0, len(blob))
    slot[:] = blob
    with tempfile.TemporaryDirectory() as directory:
        write_model(shape, Path(directory))
        config = EngineConfig(
            model=Path(directory),
            device=device,
            weight_dtype="bfloat16",
            memory_bytes=memory_bytes,
            prefix_cache=False,
        )
        with Engine(config) as engine:
            begun = time.perf_counter()
            locked = engine.register_host_memory(arena.view(0, arena.capacity_bytes))
            sources = {
                "pinned": parse_packed(slot, verify="none"),
                "pageable": parse_packed(blob, verify="none"),
            }
            return {
                "backend": engine.backend_name,
                "page_locked": locked,
                "lock_s": round(time.perf_counter() - begun, 3),
                "copies": copies(device, slot),
                "installs": installs(engine, sources),
                "decode": decode(engine, shape, sources["pinned"], rounds, seconds),
            }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--mib", type=float, default=256)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a window")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    if given.tiny:
        given.mib = 0.05
        found = measured(given.device, TINY, given.mib, 4 << 20, 1, 0.3)
    else:
        memory = int(4 * given.mib) << 20
        found = measured(given.device, Shape(), given.mib, memory, given.rounds, given.seconds)
    text = json.dumps({**measured_on(), "tiny": given.tiny, "mib": given.mib, **found}, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
