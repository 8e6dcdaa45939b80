"""The first request of an adapter that a peer holds, beside what its parts take alone.

    python bench/random_llama.py 1b DIR
    python bench/cold_start.py --model DIR/base [--repeats N] [--mib 16 256] [--out FILE]

Two nodes, one copy of each adapter. A request goes straight to the node without the copy, which
reads it from the other, checks it and installs it; then the same request again, warm. Alone are
measured: the transfer (the peer's bytes into a buffer of this program, unchecked), the check of the
bytes in memory, and the install (the first request to an embedded engine after the load, less one
that finds the adapter in pages). In turn, in one run; medians. One JSON object with machine, load,
commit and command.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from measured_on import measured_on

from loraserve import Engine, EngineConfig
from loraserve.checkpoint.adapter_source import MODULES, AdapterModule, AdapterSource
from loraserve.checkpoint.model_config import read_model_config
from loraserve.checkpoint.packed_adapter import open_packed, write_packed
from loraserve.checkpoint.packed_header import parse_header
from loraserve.checkpoint.packed_stream import ArrivingData
from loraserve.client import AsyncClient
from loraserve.demo.cluster import Cluster
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import node_pb2, node_pb2_grpc
from loraserve.wire import channel_options

PROMPT = list(range(100, 108))
PARAMS = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
BASE = "random"
MARGIN_S = 0.010
MAX_RANK = 512
ENGINE_BYTES = 1 << 30


def random_adapter(model: Path, mib: float, seed: int) -> AdapterSource:
    """Of all seven modules in bf16, of the rank that comes closest to the size."""
    config = read_model_config(model)
    rng = np.random.default_rng(seed)
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = {
        "q_proj": (hidden, heads),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (heads, hidden),
        "gate_proj": (hidden, wide),
        "up_proj": (hidden, wide),
        "down_proj": (wide, hidden),
    }
    per_rank = 2 * config.num_layers * sum(i + o for i, o in shapes.values())
    rank = max(1, round(mib * 2**20 / per_rank))
    if rank > MAX_RANK:
        raise SystemExit(f"{mib:g} MiB take rank {rank} here, over {MAX_RANK}: a wider model")

    def weights(*shape: int) -> Any:
        values = rng.standard_normal(shape, np.float32) * 0.01
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    return AdapterSource(
        None,
        tuple(
            AdapterModule(layer, name, rank, 1.0, "BF16", weights(rank, i), weights(o, rank))
            for layer in range(config.num_layers)
            for name in MODULES
            for i, o in [shapes[name]]
        ),
    )


async def timed(call: Callable[[], Awaitable[Any]]) -> float:
    begin = time.perf_counter()
    await call()
    return time.perf_counter() - begin


async def first_token_s(client: AsyncClient, adapter: str | None) -> float:
    begin = time.perf_counter()
    stream = client.stream(PROMPT, PARAMS, adapter=adapter, timeout_s=60)
    async with contextlib.aclosing(stream):
        async for chunk in stream:
            if chunk.token_ids:
                return time.perf_counter() - begin
    raise AssertionError("no token came")


async def transfer_s(address: str, revision: str, size: int) -> float:
    """Unchecked, into a buffer that is there."""
    memory = memoryview(bytearray(size))
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        stub = node_pb2_grpc.PeerServiceStub(channel)

        async def read() -> None:
            at = 0
            async for message in stub.ReadCopy(node_pb2.ReadCopyRequest(revision=revision)):
                memory[at : at + len(message.chunk)] = message.chunk
                at += len(message.chunk)
            assert at == size

        return await timed(read)


def check_s(path: Path, revision: str) -> float:
    memory = memoryview(bytearray(path.read_bytes()))
    begin = time.perf_counter()
    data = ArrivingData(parse_header(memory, revision=revision), memory, "xxh3")
    data.finish()
    return time.perf_counter() - begin


def install_s(engine: Engine, path: Path) -> float:
    """What the first request waits for beyond a later one."""

    def ask() -> float:
        begin = time.perf_counter()
        engine.submit(PROMPT, PARAMS, "cold").result()
        return time.perf_counter() - begin

    packed = open_packed(path, verify="none")
    bytes(packed.blob)  # in the page cache, as a host pool is in memory
    begin = time.perf_counter()
    engine.load_adapter("cold", packed, allow_base_mismatch=True)
    loaded = time.perf_counter() - begin
    first = ask()
    warm = statistics.median(ask() for _ in range(5))
    engine.unload_adapter("cold")
    return loaded + first - warm


async def measured(model: Path, sizes: list[float], repeats: int) -> dict[str, Any]:
    engine = Engine(
        EngineConfig(model=str(model), threads=1, memory_bytes=ENGINE_BYTES, prefetch=False)
    )
    pool_bytes = int(4 * max(sizes) * 2**20)
    found: dict[float, list[dict[str, float]]] = {mib: [] for mib in sizes}
    with tempfile.TemporaryDirectory() as directory:
        cluster = Cluster(
            Path(directory),
            2,
            model=model,
            base=BASE,
            node_options=[
                *("--threads", "1", "--memory-bytes", str(ENGINE_BYTES)),
                *("--host-pool-bytes", str(pool_bytes)),
            ],
        )
        async with cluster, AsyncClient(cluster.address) as client:
            await client.wait_routable(())
            for repeat in range(repeats + 1):  # the first warms up
                for mib in sizes:
                    name = f"a{mib:g}-{repeat}"
                    path = Path(directory) / f"{name}.lora"
                    revision = write_packed(random_adapter(model, mib, repeat), path)
                    await client.adapters.add(name, path, allow_base_mismatch=True)
                    await client.wait_routable([name], timeout_s=60)
                    parts = await one(cluster, client, name, revision, path, engine)
                    await client.adapters.remove(name)
                    path.unlink()
                    if repeat:
                        found[mib].append(parts)
    engine.close()
    return {f"{mib:g} MiB": summary(rows) for mib, rows in found.items()}


async def one(
    cluster: Cluster, client: AsyncClient, name: str, revision: str, path: Path, engine: Engine
) -> dict[str, float]:
    route = client.routes.find("", name)
    assert route is not None
    holder = route.revisions[0].holders[0].node_id
    (other,) = [n for n in cluster.nodes if n != holder]
    size = path.stat().st_size
    transfer = await transfer_s(cluster.nodes[holder].address, revision, size)
    check = check_s(path, revision)
    install = await asyncio.to_thread(install_s, engine, path)
    async with AsyncClient(nodes=[cluster.nodes[other].address]) as direct:
        await first_token_s(direct, None)  # connects
        cold = await first_token_s(direct, name)
        warm = statistics.median([await first_token_s(direct, name) for _ in range(5)])
    return {
        "bytes": size,
        "cold_s": cold,
        "warm_s": warm,
        "transfer_s": transfer,
        "check_s": check,
        "install_s": install,
    }


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    alone = median["transfer_s"] + median["check_s"] + median["install_s"]
    beyond = median["cold_s"] - median["warm_s"]
    return {
        **{key: round(value, 5) for key, value in median.items()},
        "repeats": len(rows),
        "cold_beyond_warm_s": round(beyond, 5),
        "parts_alone_s": round(alone, 5),
        "ratio_to_parts": round(beyond / alone, 3),
        "ratio_to_parts_less_margin": round((beyond - MARGIN_S) / alone, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--mib", type=float, nargs="+", default=[16, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = {
        **measured_on(),
        "sizes": asyncio.run(measured(given.model, given.mib, given.repeats)),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
