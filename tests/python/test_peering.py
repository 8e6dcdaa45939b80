"""Whole nodes that read from each other, with keys and over TLS, and what --transfer means."""

import time
from pathlib import Path
from typing import Any

import pytest
from certificates import certificate
from fake_node import BASE, FakeEngine, serving
from node_calls import node_service, run
from pool_fixtures import header_of, large, put

from loraserve.checkpoint.durable_store import DurableStore
from loraserve.errors import FailedPreconditionError, InvalidArgumentError
from loraserve.node.peers.peering import AUTO, OFF, UCX, Peering, PeerOptions
from loraserve.node.pool.arena import HostArena
from loraserve.node.pool.options import PoolOptions
from loraserve.node.pool.slots import HostPool
from loraserve.node.server import NodeServer
from loraserve.node.transfer import sidecar
from loraserve.node.transfer.program import find_program
from loraserve.security import Role, TlsFiles, channel_credentials, create_key
from loraserve.v1 import common_pb2, node_pb2
from loraserve.wire import bearer_metadata, dial

DATA = large()
POOL = PoolOptions(host_pool_bytes=8 << 20)


def load_request(*peers: str) -> node_pb2.LoadAdapterRequest:
    header = header_of(DATA)
    return node_pb2.LoadAdapterRequest(
        load=node_pb2.AdapterLoad(
            adapter=common_pb2.AdapterId(tenant="default", base=BASE, name="sql"),
            revision=header.revision,
            size_bytes=header.size_bytes,
            max_rank=header.max_rank,
            peers=[node_pb2.AdapterPeer(node_id="holder", address=address) for address in peers],
        )
    )


def reads(node: NodeServer, source: str, outcome: str) -> float:
    labels = {"source": source, "outcome": outcome}
    value = node.metrics.registry.get_sample_value("loraserve_adapter_reads_total", labels)
    return value or 0.0


async def read_from_a_peer(
    store: Path, metadata: Any, client: TlsFiles | None = None, **options: Any
) -> NodeServer:
    """The node that was told to read from one which holds the adapter."""
    put(DurableStore(str(store)), DATA)
    shared: dict[str, Any] = {"store": store, "pool": POOL, **options}
    credentials = channel_credentials(client) if client else None
    async with (
        serving(FakeEngine(), node_id="holder", **shared) as (holder, _),
        serving(FakeEngine(), node_id="reader", **shared) as (reader, _),
    ):
        for node, peers in ((holder, ()), (reader, (holder.address,))):
            async with dial(node.address, credentials) as channel:
                await node_service(channel).LoadAdapter(load_request(*peers), metadata=metadata)
        assert reads(holder, "store", "fetched") == 1
        return reader


@pytest.mark.parametrize("key", ["node", "user", "none"])
def test_nodes_need_a_key_of_the_role_node_to_read_from_each_other(
    key: str, tmp_path: Path
) -> None:
    async def test() -> None:
        keys = tmp_path / "keys"
        made = {r.value: create_key(keys, r.value, "acme", r) for r in (Role.NODE, Role.USER)}
        reader = await read_from_a_peer(
            tmp_path / "store",
            bearer_metadata(made["node"]),
            keys=keys,
            peers=PeerOptions(OFF, made.get(key)),
        )
        right = key == "node"
        assert reads(reader, "peer", "fetched") == right
        assert reads(reader, "peer", "failed") == (not right)
        assert reads(reader, "store", "fetched") == (not right)

    run(test)


def test_nodes_read_from_each_other_over_tls(tmp_path: Path) -> None:
    async def test() -> None:
        certificate(tmp_path, "ca", "", None)
        server = certificate(tmp_path, "node", "IP:127.0.0.1", "ca")
        client = TlsFiles(ca=server.ca)
        key = create_key(tmp_path / "keys", "n", "acme", Role.NODE)
        reader = await read_from_a_peer(
            tmp_path / "store",
            bearer_metadata(key),
            client,
            tls=TlsFiles(server.cert, server.key),
            keys=tmp_path / "keys",
            peers=PeerOptions(OFF, key, client),
        )
        assert reads(reader, "peer", "fetched") == 1

    run(test)


# --transfer


async def started(mode: str) -> Peering:
    pool = HostPool(HostArena(1 << 20), time.monotonic)
    return await Peering.start("n1", pool, PeerOptions(mode), lambda size: 1.0, lambda *_: None)


def test_without_the_program_auto_streams_and_ucx_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        monkeypatch.setattr(sidecar, "find_program", lambda: None)
        for mode in (AUTO, OFF):
            peering = await started(mode)
            assert (peering.exports, peering.transports()) == (None, "gRPC")
            await peering.close()
        with pytest.raises(FailedPreconditionError, match="loraserve-transfer"):
            await started(UCX)
        with pytest.raises(InvalidArgumentError, match="transfer"):
            PeerOptions("tcp")

    run(test)


def test_a_site_s_own_ucx_that_is_not_there_is_a_warning_a_missing_program_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO")

    async def told(level: str) -> None:
        caplog.clear()
        await (await started(AUTO)).close()
        levels = [r.levelname for r in caplog.records if "no one-sided reads" in r.message]
        assert levels == [level]

    async def test() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(sidecar, "find_program", lambda: None)
            await told("INFO")
        monkeypatch.setattr(sidecar, "find_program", lambda: Path("/bin/true"))
        monkeypatch.setenv("LORASERVE_UCX_PREFIX", str(tmp_path))
        await told("WARNING")

    run(test)


@pytest.mark.skipif(find_program() is None, reason="loraserve-transfer is not built")
def test_with_the_program_a_node_says_what_it_has() -> None:
    async def test() -> None:
        peering = await started(UCX)
        try:
            assert peering.exports is not None
            info = peering.sidecar.info if peering.sidecar else None
            assert info is not None
            wanted = f"UCX {info.ucx_version} ({', '.join(info.transports)}), else gRPC"
            assert peering.transports() == (wanted if info.transports else "gRPC")
        finally:
            await peering.close()

    run(test)
