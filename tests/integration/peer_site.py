"""Two nodes that hold a large adapter by the controller's placement, each behind a proxy, and a
third that is told whom to read it from."""

import asyncio
import contextlib
import re
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from peer_proxy import PeerProxy

from loraserve import Client, SamplingParams
from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import write_packed
from loraserve.client.types import AdapterInfo
from loraserve.demo import MODEL_NAME
from loraserve.demo.cluster import Cluster, Daemon
from loraserve.errors import NotFoundError
from loraserve.v1 import common_pb2, node_pb2, node_pb2_grpc
from loraserve.wire import channel_options
from loraserve.wire_errors import from_rpc_error

RANK = 256
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)
# Far above what anything here takes on a busy machine: only for what hangs.
PATIENCE_S = 120.0
# The adapter has half a minute to come from a source. One that stands still is given up long
# before, and no other is, on a busy machine.
MIN_BANDWIDTH = "0.5e6"
# Of the demo model, by module: rows that an adapter's A and B have.
SHAPES = {
    "q_proj": (192, 192),
    "k_proj": (192, 96),
    "v_proj": (192, 96),
    "o_proj": (192, 192),
    "gate_proj": (192, 512),
    "up_proj": (192, 512),
    "down_proj": (512, 192),
}


def write_adapter(path: Path, seed: int) -> None:
    """13 MiB."""
    draw = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Any:
        return 0.02 * draw.standard_normal((rows, columns), np.float32)

    modules = tuple(
        AdapterModule(layer, name, RANK, 1.0, "F32", matrix(RANK, n_in), matrix(n_out, RANK))
        for layer in range(4)
        for name, (n_in, n_out) in SHAPES.items()
    )
    write_packed(AdapterSource(MODEL_NAME, modules), path)


class Site:
    def __init__(self, cluster: Cluster, client: Client, directory: Path) -> None:
        self.cluster = cluster
        self.client = client
        self.directory = directory
        self.proxies = {name: PeerProxy() for name in ("node-1", "node-2")}
        self.pool = ThreadPoolExecutor(8)
        self.adapter: AdapterInfo
        self.expected: tuple[int, ...] = ()
        self._alone: Client
        self._channel: grpc.Channel

    # Nodes

    def spawn(self, name: str) -> Daemon:
        """node-1 only streams; the others read one-sided where they can."""
        known = self.cluster.nodes.get(name)
        options = ["--host-pool-bytes", str(64 << 20), "--min-fetch-bandwidth", MIN_BANDWIDTH]
        options += ["--listen", known.address] if known else []
        if name == "node-1":
            options += ["--transfer", "off"]
        if name in self.proxies:
            options += ["--advertise", self.proxies[name].address]
        else:  # none of the controller's: it is told what to do by these tests alone
            options += ["--controller", ""]
        return self.cluster.spawn_node(name, options)

    def started(self, daemon: Daemon) -> None:
        asyncio.run(self.cluster.ready(daemon))
        if daemon.name in self.proxies:
            self.proxies[daemon.name].target = daemon.address

    @property
    def reader(self) -> Daemon:
        return self.cluster.nodes["node-3"]

    def connect(self) -> None:
        self._alone = Client(nodes=[self.reader.address])
        self._channel = grpc.insecure_channel(self.reader.address, channel_options())
        self.stub: Any = node_pb2_grpc.NodeServiceStub(self._channel)

    def peers(self, *names: str) -> list[node_pb2.AdapterPeer]:
        return [
            node_pb2.AdapterPeer(node_id=name, address=self.proxies[name].address) for name in names
        ]

    def held_by_both(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while self.holders() != ["node-1", "node-2"]:
            assert time.monotonic() < end, self.holders()
            time.sleep(0.05)

    def holders(self) -> list[str]:
        """Nodes whose copy the controller takes for whole."""
        adapter = self.client.routes.adapters
        return sorted(
            holder.node_id
            for route in adapter.values()
            for revision in [route.of(None)]
            if revision is not None
            for holder in revision.holders
        )

    # What the reader is asked for

    def load(
        self, peers: list[node_pb2.AdapterPeer], adapter: AdapterInfo | None = None
    ) -> "Future[Any]":
        about = adapter or self.adapter
        load = node_pb2.AdapterLoad(
            adapter=common_pb2.AdapterId(tenant="default", base=MODEL_NAME, name=about.name),
            revision=about.revision,
            size_bytes=about.size_bytes,
            max_rank=about.max_rank,
            peers=peers,
        )
        request = node_pb2.LoadAdapterRequest(load=load)
        return self.pool.submit(lambda: self.stub.LoadAdapter(request, timeout=PATIENCE_S))

    def answer(self) -> tuple[int, ...]:
        """Of the reader, with the adapter; waits for it where it is on its way."""
        completion = self._alone.generate(
            "abc", GREEDY, adapter=self.adapter.name, timeout_s=PATIENCE_S
        )
        return tuple(completion.token_ids)

    def loaded(self, loading: "Future[Any]") -> None:
        """The load ends, and the adapter answers as it does at its holders."""
        loading.result(PATIENCE_S)
        assert self.answer() == self.expected

    def unload(self) -> None:
        adapter = common_pb2.AdapterId(tenant="default", base=MODEL_NAME, name=self.adapter.name)
        try:
            request = node_pb2.UnloadAdapterRequest(adapter=adapter)
            self.stub.UnloadAdapter(request, timeout=PATIENCE_S)
        except grpc.RpcError as error:
            if not isinstance(from_rpc_error(error), NotFoundError):
                raise

    def read_one_sided(self) -> None:
        """Returns when that goes (again)."""
        end = time.monotonic() + PATIENCE_S
        before = self.reads().get("ucx", 0)
        while self.reads().get("ucx", 0) == before:
            assert time.monotonic() < end
            self.loaded(self.load(self.peers("node-2")))
            self.unload()

    def reads(self, name: str = "node-3") -> dict[str, int]:
        """A node's counts: by "source outcome", and by transport of what came from peers."""
        url = f"http://{self.cluster.nodes[name].metrics}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            text = answer.read().decode()
        found = re.findall(
            r'^loraserve_adapter_reads_total{outcome="(\w+)",source="(\w+)"} (\S+)$', text, re.M
        )
        reads = {f"{source} {outcome}": round(float(n)) for outcome, source, n in found}
        ways = re.findall(r'^loraserve_peer_reads_total{transport="(\w+)"} (\S+)$', text, re.M)
        return reads | {way: round(float(n)) for way, n in ways}

    @contextlib.contextmanager
    def counted(self, *expected: str) -> Iterator[None]:
        """The block's reads end so, each once, and no others."""
        before = self.reads()
        yield
        now = self.reads()
        new = {name: n - before.get(name, 0) for name, n in now.items() if n != before.get(name, 0)}
        assert new == dict.fromkeys(expected, 1)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        for proxy in self.proxies.values():
            proxy.close()
        self._channel.close()
        self._alone.close()
