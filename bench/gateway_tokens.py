"""What a token costs from the engine's step to a client's socket, and what an idle stream costs.

    python bench/gateway_tokens.py [--streams 256] [--tokens-per-s 12800] [--seconds 10]
        [--idle 10000] [--parts tokens,latency,idle] [--out FILE]

A node with an engine that computes nothing (every request gets a token at each step, at a pace; all
that is Python in a node is the product's), the gateway, and a client, each a process of its own on
this machine. `tokens`: streams of /v1/completions with text; tokens/s that came, CPU of node and
gateway for each of them, and the highest rate that came of those asked for. `latency`: the gateway
against the SDK going to the node directly, in turns within one run. `idle`: streams that wait for
their first token; what each takes of the gateway's memory. CPU is what the processes' own clocks
say: it holds, a little high, on a machine that does other things as well. One JSON object with
machine, load, commit and command.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measured_on import measured_on

from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME

FIRST_TOKEN, TOKENS = 65, 26  # letters, in the demo's tokenizer
TICKS = os.sysconf("SC_CLK_TCK")


# The node: the product's but for the engine


def synthetic_engine(step_s: float) -> Any:
    """loraserve.engine.Engine over an engine that computes nothing."""
    from loraserve import _testing
    from loraserve.checkpoint.model_config import read_model_config
    from loraserve.engine import Engine, EngineConfig
    from loraserve.engine.adapters import AdapterTable
    from loraserve.engine.delivery import Delivery
    from loraserve.text.tokenizer import Tokenizer

    engine: Any = Engine.__new__(Engine)
    engine.config = EngineConfig(model=str(MODEL_DIRECTORY))
    engine.tokenizer = Tokenizer.from_directory(MODEL_DIRECTORY)
    engine.model_config = read_model_config(MODEL_DIRECTORY)
    engine.base_digest, engine.weight_dtype = "", "float32"
    engine._native = _testing.PacedEngine(step_s, FIRST_TOKEN, TOKENS)
    engine._end_ids = frozenset(engine.tokenizer.eos_ids)
    engine._table = AdapterTable(engine._native, engine.config, "")
    engine._delivery = Delivery(engine._native, engine._table.removed, engine._table.installs)
    engine._ids = itertools.count(1)
    engine._lock = threading.Lock()
    engine._live = set()
    return engine


def node_role(arguments: argparse.Namespace) -> int:
    from loraserve.daemon import run_daemon
    from loraserve.node.engine_api import LoadedModel, ModelFacts
    from loraserve.node.limits import Limits
    from loraserve.node.model import read_adapter
    from loraserve.node.server import NodeOptions, NodeServer

    facts = ModelFacts(MODEL_NAME, "", 1 << 30, 259)
    limits = Limits(max_sequences=20_000, stall_timeout_s=300)
    options = NodeOptions("bench", MODEL_NAME, listen="127.0.0.1:0", limits=limits)
    words = argparse.Namespace(
        log_level="warning",
        log_format="text",
        end_with=os.getppid(),
        port_file=arguments.port_file,
        metrics_port_file=None,
    )
    import logging

    def make() -> NodeServer:
        engine = synthetic_engine(arguments.step_s)
        return NodeServer(options, lambda: LoadedModel(engine, facts), read_adapter)

    return run_daemon("node", words, logging.getLogger("bench"), make)


_TEXT = re.compile(rb'"text": "([a-z]*)"')

# The client: raw sockets, so that it leaves the cores to what is measured


class Streams(asyncio.Protocol):
    """One SSE stream; counts tokens, each of which is a letter."""

    def __init__(self, request: bytes, counted: list[int], first: asyncio.Event | None) -> None:
        self._request, self._counted, self._first = request, counted, first
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._counted[0] += sum(map(len, _TEXT.findall(data)))
        if self._first is not None:
            self._first.set()
            self._first = None


def http(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(data), data)
    )


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


class Site:
    """Node and gateway, for as long as a measurement takes."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    def __enter__(self) -> "Site":
        self._directory = tempfile.TemporaryDirectory(prefix="gateway-bench-")
        root = Path(self._directory.name)
        me = [sys.executable, __file__, "--role", "node", "--step-s", str(self._step_s)]
        self.node = subprocess.Popen([*me, "--port-file", str(root / "node")])
        self.node_address = self._address(root / "node", self.node)
        words = ["--node", self.node_address, "--base", MODEL_NAME, "--log-level", "warning"]
        words += ["--tokenizer", str(MODEL_DIRECTORY), "--listen", "127.0.0.1:0"]
        words += ["--port-file", str(root / "gateway"), "--end-with", str(os.getpid())]
        self.gateway = subprocess.Popen([sys.executable, "-m", "loraserve.gateway.main", *words])
        self.address = self._address(root / "gateway", self.gateway)
        return self

    @staticmethod
    def _address(path: Path, process: "subprocess.Popen[bytes]") -> str:
        end = time.monotonic() + 60
        while not path.exists():
            assert process.poll() is None, "ended while it started"
            assert time.monotonic() < end
            time.sleep(0.02)
        return path.read_text().strip()

    def __exit__(self, *_: object) -> None:
        for process in (self.gateway, self.node):
            process.kill()
            process.wait()
        self._directory.cleanup()


async def _open(address: str, count: int, body: dict[str, Any], counted: list[int]) -> list[Any]:
    host, port = address.rsplit(":", 1)
    loop = asyncio.get_running_loop()
    request, opened = http(body), []
    for _ in range(count):
        _, protocol = await loop.create_connection(
            lambda: Streams(request, counted, None), host, int(port)
        )
        opened.append(protocol)
    return opened


def tokens(streams: int, rate: float, seconds: float) -> dict[str, Any]:
    """At one rate of the engine."""

    async def measure(site: Site) -> dict[str, Any]:
        counted = [0]
        body = {"model": MODEL_NAME, "prompt": "x", "max_tokens": 1 << 24, "stream": True}
        body |= {"ignore_eos": True}
        await _open(site.address, streams, body, counted)
        end = time.monotonic() + 30
        while counted[0] < 3 * streams and time.monotonic() < end:
            await asyncio.sleep(0.05)
        assert counted[0], "no stream got a token"
        await asyncio.sleep(1.0)
        pids = {"node": site.node.pid, "gateway": site.gateway.pid, "client": os.getpid()}
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        start, first = time.monotonic(), counted[0]
        await asyncio.sleep(seconds)
        took, came = time.monotonic() - start, counted[0] - first
        used = {name: cpu_s(pid) - before[name] for name, pid in pids.items()}
        return {
            "asked_tokens_per_s": rate,
            "tokens_per_s": round(came / took),
            **{f"{name}_us_per_token": round(1e6 * s / came, 2) for name, s in used.items()},
            **{f"{name}_cores": round(s / took, 3) for name, s in used.items()},
        }

    import uvloop

    with Site(streams / rate) as site:
        return uvloop.run(measure(site))


def latency(count: int) -> dict[str, Any]:
    """TTFT and TBT by HTTP and by the SDK, in turns, one stream at a time."""
    from loraserve import AsyncClient, SamplingParams

    length, step_s = 32, 0.005

    async def by_sdk(client: AsyncClient) -> list[float]:
        times = [time.monotonic()]
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        async for _ in client.stream("x", params):
            times.append(time.monotonic())
        return times

    async def by_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> list[float]:
        body = {"model": MODEL_NAME, "prompt": "x", "max_tokens": length, "stream": True}
        times = [time.monotonic()]
        writer.write(http(body | {"ignore_eos": True}))
        while True:
            line = await reader.readline()
            if line.startswith(b"data: {"):
                times.append(time.monotonic())
            elif line.startswith(b"data: [DONE]"):
                await reader.readuntil(b"0\r\n\r\n")
                return times

    def spread(runs: list[list[float]]) -> dict[str, float]:
        ttft = sorted(1e3 * (times[1] - times[0]) for times in runs)
        tbt = sorted(1e3 * (b - a) for times in runs for a, b in itertools.pairwise(times[1:]))
        return {
            "ttft_p50_ms": round(ttft[len(ttft) // 2], 3),
            "ttft_p95_ms": round(ttft[int(0.95 * len(ttft))], 3),
            "tbt_p50_ms": round(tbt[len(tbt) // 2], 3),
            "tbt_p95_ms": round(tbt[int(0.95 * len(tbt))], 3),
        }

    async def measure(site: Site) -> dict[str, Any]:
        host, port = site.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        ways: dict[str, list[list[float]]] = {"sdk": [], "http": []}
        async with AsyncClient(nodes=[site.node_address]) as client:
            for _ in range(count):
                ways["sdk"].append(await by_sdk(client))
                ways["http"].append(await by_http(reader, writer))
        writer.close()
        found = {name: spread(runs[2:]) for name, runs in ways.items()}
        added = {
            name: round(found["http"][name] - found["sdk"][name], 3)
            for name in ("ttft_p50_ms", "tbt_p50_ms")
        }
        return {"requests": count, "step_ms": 1e3 * step_s, **found, "gateway_adds": added}

    with Site(step_s) as site:
        return asyncio.run(measure(site))


def idle(count: int) -> dict[str, Any]:
    """Streams whose first token does not come."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 1000
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
        count = min(count, (min(wanted, hard) - 1000) // 2)

    async def measure(site: Site) -> dict[str, Any]:
        counted = [0]
        body = {"model": MODEL_NAME, "prompt": "x", "max_tokens": 64, "stream": True}
        await _open(site.address, 200, body, counted)  # what is allocated once
        await asyncio.sleep(2)
        before = {"gateway": rss_bytes(site.gateway.pid), "node": rss_bytes(site.node.pid)}
        await _open(site.address, count, body, counted)
        await asyncio.sleep(5)
        used = {
            "gateway": rss_bytes(site.gateway.pid) - before["gateway"],
            "node": rss_bytes(site.node.pid) - before["node"],
        }
        spent = cpu_s(site.gateway.pid)
        await asyncio.sleep(5)
        return {
            "streams": count,
            "gateway_bytes_each": round(used["gateway"] / count),
            "node_bytes_each": round(used["node"] / count),
            "gateway_cores": round((cpu_s(site.gateway.pid) - spent) / 5, 3),
        }

    import uvloop

    with Site(3600.0) as site:
        return uvloop.run(measure(site))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument(
        "--tokens-per-s", type=float, nargs="+", default=[12800.0, 25600.0, 51200.0]
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=100, help="of each way, for latency")
    parser.add_argument("--parts", default="tokens,latency,idle")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", choices=("node",), help=argparse.SUPPRESS)
    parser.add_argument("--step-s", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--port-file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "node":
        return node_role(arguments)
    result: dict[str, Any] = measured_on()
    parts = arguments.parts.split(",")
    if "tokens" in parts:
        result["tokens"] = [
            tokens(arguments.streams, rate, arguments.seconds) for rate in arguments.tokens_per_s
        ]
    if "latency" in parts:
        result["latency"] = latency(arguments.requests)
    if "idle" in parts:
        result["idle"] = idle(arguments.idle)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
