"""A node and the real controller in one process: placed, resolved, restarted, away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
from controller_fixtures import Site, controller
from fake_node import BASE, FakeEngine, blob, letter_of, revision, serving, until
from node_calls import answers, refused, run

from loraserve.controller.admission import PackedCheck
from loraserve.node.held import HOST
from loraserve.node.server import NodeServer
from loraserve.wire import bearer_metadata

SQL = {"name": "sql"}


@asynccontextmanager
async def node(
    site: Site, tmp_path: Path, engine: FakeEngine, **options: Any
) -> AsyncIterator[tuple[NodeServer, grpc.aio.Channel]]:
    """Takes the controller's keys; its adapters come from the controller alone."""
    given = {
        "controller": site.server.address,
        "controller_key": site.keys["node"],
        "keys": tmp_path / "keys.jsonl",
    }
    async with serving(engine, **(given | options)) as (server, channel):
        yield server, channel


def states(server: NodeServer) -> dict[str, int]:
    return {
        f"{r.adapter.tenant}/{r.adapter.name}@{letter_of(r.revision)}": r.state
        for r in server.node.adapters.residency()
    }


def test_an_upload_is_placed_served_updated_and_removed(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.005)
        async with (
            controller(tmp_path, new_check=PackedCheck) as site,
            node(site, tmp_path, engine) as (server, channel),
        ):
            acme, zeta = site.auth("acme"), site.auth("zeta")
            await site.create("sql", blob("a"), base=BASE)
            await until(lambda: states(server) == {"acme/sql@a": HOST}, "placed")
            out = await answers(channel, adapter=SQL, metadata=acme)
            assert out[0].start.revision == revision("a")
            assert (await refused(answers(channel, adapter=SQL, metadata=zeta))).code == "NOT_FOUND"
            denied = await refused(answers(channel, adapter=SQL, metadata=site.auth("node")))
            assert denied.code == "PERMISSION_DENIED"
            long = asyncio.ensure_future(
                answers(channel, "old", adapter=SQL, metadata=acme, sampling={"max_tokens": 100})
            )
            await until(lambda: len(engine.calls) == 2, "running")
            await site.update("sql", blob("b"), base=BASE)
            while True:
                new = await answers(channel, "new", adapter=SQL, metadata=acme)
                if new[0].start.revision == revision("b"):
                    break
            assert {m.start.revision for m in await long if m.HasField("start")} == {revision("a")}
            await until(lambda: states(server) == {"acme/sql@b": HOST}, "the old one goes")
            await site.delete("sql", base=BASE)
            await until(lambda: states(server) == {}, "gone")
            assert engine.loaded == {}
            gone = await refused(answers(channel, adapter=SQL, metadata=acme))
            assert gone.code == "NOT_FOUND"

    run(test)


def test_a_node_asks_for_what_was_not_placed_on_it(tmp_path: Path) -> None:
    async def test() -> None:
        first, second = FakeEngine(), FakeEngine()
        async with (
            controller(tmp_path, new_check=PackedCheck) as site,
            node(site, tmp_path, first) as (one, channel),
            node(site, tmp_path, second, node_id="n2") as (two, other),
        ):
            await site.create("sql", blob("a"), base=BASE)
            await until(lambda: bool(states(one) or states(two)), "placed")
            acme = site.auth("acme")
            for way in (channel, other):
                uses = [answers(way, f"r{i}", adapter=SQL, metadata=acme) for i in range(5)]
                for out in await asyncio.gather(*uses):
                    assert out[0].start.revision == revision("a")
            assert (len(first.loaded), len(second.loaded)) == (1, 1)
            absent = await refused(answers(other, adapter={"name": "none"}, metadata=acme))
            assert (absent.code, absent.field) == ("NOT_FOUND", "adapter")
            pinned = {"name": "sql", "revision": revision("c")}
            assert (
                await refused(answers(other, adapter=pinned, metadata=acme))
            ).code == "NOT_FOUND"

    run(test)


def test_serving_goes_on_without_the_controller_and_finds_it_again(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with controller(tmp_path, new_check=PackedCheck) as site:
            listen = site.server.address
            keys = dict(site.keys)
            await site.create("sql", blob("a"), base=BASE)
            hosting = node(site, tmp_path, engine)
            server, channel = await hosting.__aenter__()
            await until(lambda: states(server) == {"acme/sql@a": HOST}, "placed")
            old = server._link.epoch if server._link else 0
        try:
            acme = bearer_metadata(keys["acme"])
            assert await answers(channel, adapter=SQL, metadata=acme)
            assert await answers(channel, metadata=acme)
            unknown = await refused(answers(channel, adapter={"name": "new"}, metadata=acme))
            assert (unknown.code, unknown.field) == ("UNAVAILABLE", "adapter")
            assert "controller does not answer" in unknown.message
            async with controller(
                tmp_path, new_check=PackedCheck, listen=listen, keys=keys
            ) as site:
                await until(lambda: bool(site.server.runtime.state.nodes), "registered")
                assert server._link is not None
                await until(lambda: server._link.epoch == old + 1, "a new epoch")  # type: ignore[union-attr]
                assert (await site.served("sql", ["n1"])).revision == revision("a")
                assert len(engine.loaded) == 1
                assert engine.unloaded == []
                assert await answers(channel, adapter=SQL, metadata=acme)
        finally:
            await hosting.__aexit__(None, None, None)

    run(test)


def test_a_node_with_a_wrong_key_serves_what_it_has(tmp_path: Path, caplog: Any) -> None:
    async def test() -> None:
        async with (
            controller(tmp_path, new_check=PackedCheck) as site,
            node(site, tmp_path, FakeEngine(), controller_key="lsk_wrong") as (server, channel),
        ):
            await until(lambda: "serving goes on" in caplog.text, "told")
            acme = site.auth("acme")
            assert await answers(channel, metadata=acme)
            error = await refused(answers(channel, adapter=SQL, metadata=acme))
            # The node's trouble is not the caller's: it must not read "your key is wrong".
            assert (error.code, error.field) == ("UNAVAILABLE", "adapter")
            assert "authorization" not in error.message
            assert not site.server.runtime.state.nodes
            assert server.node

    run(test)
