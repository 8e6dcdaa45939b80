"""A node that reads an adapter from others, which are killed, frozen, made to lie and to lose it:
each time the adapter comes from elsewhere, and nobody else notices.

Two nodes hold it by the controller's placement; a third, of its own, is told whom to read from.
"""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from peer_site import GREEDY, PATIENCE_S, Site, write_adapter

from loraserve import Client
from loraserve.demo import MODEL_NAME
from loraserve.demo.cluster import Cluster, Daemon
from loraserve.errors import LoraServeError
from loraserve.node.transfer.program import find_program
from loraserve.v1 import common_pb2, node_pb2, node_pb2_grpc
from loraserve.wire_errors import from_rpc_error

ONE_SIDED = ("peer fetched", "ucx") if find_program() else ("peer fetched", "grpc")
STREAMED = ("peer fetched", "grpc")


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("peers")
    write_adapter(directory / "big.lora", 0)
    options = ["--replicas", "2"]
    cluster = Cluster(directory, 0, controller_options=options, node_options=["--threads", "1"])
    asyncio.run(cluster.__aenter__())
    try:
        with Client(cluster.address) as client:
            site = Site(cluster, client, directory)
            for daemon in [site.spawn(name) for name in ("node-1", "node-2", "node-3")]:
                site.started(daemon)
            site.connect()
            client.wait_routable(())
            site.adapter = client.adapters.add("big", directory / "big.lora", base=MODEL_NAME)
            site.held_by_both()
            site.expected = tuple(client.generate("abc", GREEDY, adapter="big").token_ids)
            yield site
            site.close()
    finally:
        codes = asyncio.run(cluster.stop())
    assert all(code == 0 for code in codes.values()), codes
    for daemon in cluster.daemons:
        log = daemon.log.read_text()
        assert "Traceback" not in log, log


@pytest.fixture
def site(whole_site: Site) -> Iterator[Site]:
    """Both hold the adapter, the reader does not; and afterwards everything still serves."""
    whole_site.held_by_both()
    traffic = Traffic(whole_site)
    try:
        yield whole_site
    finally:
        whole_site.unload()
        traffic.end()


class Traffic:
    """Requests of the base model at the reader, one after another, all of which must succeed."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._over = threading.Event()
        self._running = site.pool.submit(self._run)

    def _run(self) -> int:
        count = 0
        with Client(nodes=[self._site.reader.address]) as client:
            while not self._over.wait(0.01):
                assert len(client.generate("abc", GREEDY, timeout_s=PATIENCE_S).token_ids) == 4
                count += 1
        return count

    def end(self) -> None:
        self._over.set()
        assert self._running.result(PATIENCE_S) > 0


# Nothing is wrong


def test_an_adapter_comes_from_either_holder_while_others_are_answered(site: Site) -> None:
    with site.counted(*STREAMED):
        site.loaded(site.load(site.peers("node-1", "node-2")))
    site.unload()
    with site.counted(*ONE_SIDED):
        site.loaded(site.load(site.peers("node-2", "node-1")))


def test_a_request_waits_for_the_adapter_and_others_do_not(site: Site) -> None:
    with site.proxies["node-1"].holding():
        loading = site.load(site.peers("node-1"))
        assert site.proxies["node-1"].held.wait(PATIENCE_S)
        waiting = site.pool.submit(site.answer)
        with Client(nodes=[site.reader.address]) as client:
            assert len(client.generate("abc", GREEDY, timeout_s=PATIENCE_S).token_ids) == 4
        assert not waiting.done()
        assert not loading.done()
    assert waiting.result(PATIENCE_S) == site.expected
    site.loaded(loading)


# Holders that fail


def test_a_holder_that_is_killed_in_the_middle_and_comes_back(site: Site) -> None:
    with site.counted("peer failed", *ONE_SIDED):
        with site.proxies["node-1"].holding():
            loading = site.load(site.peers("node-1", "node-2"))
            assert site.proxies["node-1"].held.wait(PATIENCE_S)
            waiting = site.pool.submit(site.answer)
            site.cluster.nodes["node-1"].process.kill()
            site.cluster.nodes["node-1"].process.wait()
        site.loaded(loading)
        assert waiting.result(PATIENCE_S) == site.expected
    site.unload()
    with site.counted("peer failed", *ONE_SIDED):  # nobody is there
        site.loaded(site.load(site.peers("node-1", "node-2")))
    site.unload()
    # Another life at the same address, which the controller has had read from the other holder.
    site.started(site.spawn("node-1"))
    site.held_by_both()
    assert site.reads("node-1") == {"peer fetched": 1, "grpc": 1}
    with site.counted(*STREAMED):
        site.loaded(site.load(site.peers("node-1")))


def test_a_holder_that_freezes_in_the_middle(site: Site) -> None:
    frozen = site.cluster.nodes["node-1"].process
    with site.counted("peer failed", *ONE_SIDED):
        with site.proxies["node-1"].holding():
            loading = site.load(site.peers("node-1", "node-2"))
            assert site.proxies["node-1"].held.wait(PATIENCE_S)
            frozen.send_signal(signal.SIGSTOP)
        try:
            site.loaded(loading)
        finally:
            frozen.send_signal(signal.SIGCONT)


def test_a_holder_that_loses_the_copy_in_the_middle_gives_it_to_its_end(site: Site) -> None:
    name = site.adapter.name
    adapter = common_pb2.AdapterId(tenant="default", base=MODEL_NAME, name=name)
    with (
        site.counted(*STREAMED),
        grpc.insecure_channel(site.cluster.nodes["node-1"].address) as channel,
    ):
        stub: Any = node_pb2_grpc.NodeServiceStub(channel)
        with site.proxies["node-1"].holding():
            loading = site.load(site.peers("node-1"))
            assert site.proxies["node-1"].held.wait(PATIENCE_S)
            stub.UnloadAdapter(node_pb2.UnloadAdapterRequest(adapter=adapter), timeout=PATIENCE_S)
        site.loaded(loading)


@pytest.mark.parametrize("then", ["another holder", "the store"])
def test_a_holder_that_lies(site: Site, then: str) -> None:
    others = ["node-2"] if then == "another holder" else []
    good = ONE_SIDED if others else ("store fetched",)
    with site.counted("peer corrupt", *good), site.proxies["node-1"].lying():
        site.loaded(site.load(site.peers("node-1", *others)))


# Sidecars and the store


def sidecars(daemon: Daemon) -> list[int]:
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text()
    return [
        int(pid)
        for pid in children.split()
        if "loraserve-trans" in Path(f"/proc/{pid}/comm").read_text()
    ]


@pytest.mark.skipif(find_program() is None, reason="loraserve-transfer is not built")
@pytest.mark.parametrize("whose", ["node-2", "node-3"])
def test_a_sidecar_that_is_killed_is_no_loss(site: Site, whose: str) -> None:
    daemon = site.cluster.nodes[whose]
    (killed,) = sidecars(daemon)
    os.kill(killed, signal.SIGKILL)
    site.loaded(site.load(site.peers("node-2")))
    assert daemon.process.poll() is None
    site.unload()
    site.read_one_sided()
    assert sidecars(daemon) not in ([], [killed])


@pytest.mark.skipif(find_program() is None, reason="loraserve-transfer is not built")
def test_a_sidecar_that_hangs_costs_an_attempt(site: Site) -> None:
    site.read_one_sided()
    (stopped,) = sidecars(site.reader)
    os.kill(stopped, signal.SIGSTOP)
    try:
        site.loaded(site.load(site.peers("node-2")))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)


def test_without_the_store_adapters_come_from_peers_and_without_peers_from_the_store(
    site: Site,
) -> None:
    dead = node_pb2.AdapterPeer(node_id="node-9", address="127.0.0.1:1")
    with site.counted("store fetched", "peer failed"):
        site.loaded(site.load([dead]))
    site.unload()
    store, away = site.directory / "data" / "adapters", site.directory / "away"
    store.rename(away)
    try:
        with site.counted(*STREAMED):  # its header is known from before
            site.loaded(site.load(site.peers("node-1")))
        site.unload()
        with pytest.raises(grpc.RpcError) as caught:
            site.load([dead]).result(PATIENCE_S)
        assert isinstance(from_rpc_error(caught.value), LoraServeError)
    finally:
        away.rename(store)
    site.loaded(site.load([]))
