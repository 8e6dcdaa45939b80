"""Twice as many hot adapters as fit in device pages, beside all of them resident.

    python bench/adapter_thrash.py [--seconds S] [--clients 8 16 32] [--out FILE]

Clients ask, one request at a time each, for adapters drawn evenly from 32. The engine has pages for
all of them and the KV cache, or for 16; both engines are driven in turn, in one run. Throughput is
generated tokens a second, time to first token is from submission. One engine thread; requests are
made by an event loop, as in a node. Numbers of one machine, which should have nothing else to do.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from measured_on import measured_on
from random_model import Shape, random_adapter, write_model

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.checkpoint.packed_adapter import pack, parse_packed

SHAPE = Shape(hidden=384, layers=6, heads=6, kv_heads=2, intermediate=1024, vocabulary=4000)
ADAPTERS, RESIDENT = 32, 16
ADAPTER_MIB = 8.0
KV_BYTES = 96 << 20
PROMPT_TOKENS, OUTPUT_TOKENS = 48, 16


@dataclass
class Seen:
    """Of the requests that began and ended in the measured time."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0


async def client(engine: Engine, seed: int, begin: float, end: float, seen: Seen) -> None:
    rng = random.Random(seed)
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    while time.perf_counter() < end:
        prompt = [rng.randrange(3, SHAPE.vocabulary) for _ in range(PROMPT_TOKENS)]
        asked = last = time.perf_counter()
        async for chunk in engine.stream(prompt, params, f"a{rng.randrange(ADAPTERS)}"):
            now = time.perf_counter()
            if begin <= now < end:
                seen.tokens += len(chunk.token_ids)
                if asked >= begin:
                    (seen.ttft if last == asked else seen.gaps).append(now - last)
            last = now


def drive(engine: Engine, clients: int, seconds: float, seed: int, seen: Seen) -> None:
    begin = time.perf_counter() + min(2.0, seconds / 4)  # after the pages have filled

    async def all_of_them() -> None:
        runs = [
            client(engine, seed * 1000 + i, begin, begin + seconds, seen) for i in range(clients)
        ]
        await asyncio.gather(*runs)

    asyncio.run(all_of_them())


def warm(engine: Engine) -> None:
    """Asks once for each adapter: what fits is in its pages when the measuring begins."""
    one = SamplingParams(max_tokens=1, ignore_eos=True)
    for index in range(ADAPTERS):
        engine.submit([5, 6, 7], one, f"a{index}").result(timeout_s=60.0)


def numbers(seen: Seen, seconds: float) -> dict[str, float]:
    return {
        "requests": len(seen.ttft),
        "tokens_per_s": round(seen.tokens / seconds, 1),
        **{f"ttft_p{q}_ms": round(1e3 * float(np.percentile(seen.ttft, q)), 1) for q in (50, 95)},
        "tbt_p95_ms": round(1e3 * float(np.percentile(seen.gaps, 95)), 1),
    }


def compared(engines: dict[str, Engine], clients: int, rounds: int, seconds: float) -> Any:
    for engine in engines.values():
        warm(engine)
    seen = {name: Seen() for name in engines}
    before = {name: engine.stats() for name, engine in engines.items()}
    for round_ in range(rounds):
        for name, engine in engines.items():
            drive(engine, clients, seconds, round_, seen[name])
    found: dict[str, Any] = {name: numbers(seen[name], rounds * seconds) for name in engines}
    for name, engine in engines.items():
        stats, old = engine.stats(), before[name]
        found[name]["installs"] = stats.adapter_installs - old.adapter_installs
        waits = stats.adapter_waits - old.adapter_waits
        waited = stats.adapter_wait_seconds - old.adapter_wait_seconds
        found[name]["mean_adapter_wait_ms"] = round(1e3 * waited / waits, 1) if waits else 0.0
    all_of, half = found["all resident"], found["half fit"]
    assert all_of["installs"] == 0, "all resident, and installed all the same"
    for key, ratio in (
        ("tokens_per_s", "throughput_ratio"),
        ("ttft_p95_ms", "ttft_p95_ratio"),
        ("tbt_p95_ms", "tbt_p95_ratio"),
    ):
        found[ratio] = round(half[key] / all_of[key], 3)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {
        **measured_on(),
        "adapters": ADAPTERS,
        "fit": RESIDENT,
        "adapter_mib": ADAPTER_MIB,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "clients": {},
    }
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        write_model(SHAPE, model)
        packed = [
            parse_packed(pack(random_adapter(SHAPE, ADAPTER_MIB, seed))) for seed in range(ADAPTERS)
        ]
        engines = {}
        for name, fit in (("all resident", ADAPTERS), ("half fit", RESIDENT)):
            config = EngineConfig(
                model=model,
                weight_dtype="bfloat16",
                memory_bytes=KV_BYTES + round(1.02 * fit * ADAPTER_MIB * 2**20),
                threads=1,
                max_sequences=max(given.clients),
                prefix_cache=False,
            )
            engines[name] = Engine(config)
            for index, adapter in enumerate(packed):
                engines[name].load_adapter(f"a{index}", adapter)
        for clients in given.clients:
            result["clients"][str(clients)] = compared(
                engines, clients, given.rounds, given.seconds
            )
        for engine in engines.values():
            engine.close()
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
