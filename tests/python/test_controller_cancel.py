"""A caller that hangs up in the middle of a change: the change is whole or not at all."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from controller_fixtures import FakeNode, Site, controller
from fake_node import until

from loraserve.controller.store import SqliteStore
from loraserve.v1 import adapter_pb2

PACKED = b"PACKED base 8 one"
SLOW_S = 0.2


def play(tmp_path: Path, script: Callable[[Site], Awaitable[None]]) -> None:
    async def run() -> None:
        async with controller(tmp_path) as site:
            await asyncio.wait_for(script(site), 120)

    asyncio.run(run())


def slow(monkeypatch: pytest.MonkeyPatch, method: str) -> list[str]:
    """Makes a write of the store slow; the answer tells which were begun."""
    begun: list[str] = []
    original = getattr(SqliteStore, method)

    def wrapped(self: SqliteStore, *args: Any) -> Any:
        begun.append(method)
        time.sleep(SLOW_S)
        return original(self, *args)

    monkeypatch.setattr(SqliteStore, method, wrapped)
    return begun


async def hang_up(call: "asyncio.Task[Any]", begun: list[str]) -> None:
    await until(lambda: bool(begun), "the write has begun")
    call.cancel()
    await asyncio.wait({call})


def test_routes_are_told_though_the_node_that_changed_them_hung_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = slow(monkeypatch, "save_placement")

    async def script(site: Site) -> None:
        await site.create("sql", PACKED)
        seen: list[str] = []

        async def watch() -> None:
            async for message in site.watch("node"):
                seen.append("a table")
                seen.extend(node.node_id for node in message.nodes)

        watching = asyncio.create_task(watch())
        await until(lambda: bool(seen), "the watcher has the table of now")
        node = FakeNode(site, "n1")
        begun.clear()
        await hang_up(asyncio.create_task(node.register()), begun)
        await until(lambda: "n1" in seen, "the watcher has heard of the node")
        watching.cancel()

    play(tmp_path, script)


@pytest.mark.parametrize("what", ["create", "update", "delete"])
def test_a_change_of_an_adapter_is_whole(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(site: Site) -> None:
        if what != "create":
            await site.create("sql", PACKED)
        begun = slow(monkeypatch, "remove_adapter" if what == "delete" else "put_adapter")
        change = {
            "create": lambda: site.create("sql", PACKED),
            "update": lambda: site.update("sql", b"PACKED base 16 two"),
            "delete": lambda: site.delete("sql"),
        }[what]
        await hang_up(asyncio.create_task(change()), begun)
        wanted = {"create": [8], "update": [16], "delete": []}[what]

        def done() -> bool:
            records = site.server.runtime.store.adapters()
            staged = list((tmp_path / "data" / "staging").iterdir())
            return [r.history[0].max_rank for r in records] == wanted and not staged

        await until(done, "the change is whole")
        listed = await site.adapters.ListAdapters(
            adapter_pb2.ListAdaptersRequest(), metadata=site.auth("acme")
        )
        shown = [adapter.max_rank for adapter in listed.adapters]
        state = site.server.runtime.state
        specs = [state.current(adapter) for adapter in state.routes.adapters]
        assert [spec.max_rank for spec in specs if spec] == shown
        assert shown == wanted

    play(tmp_path, script)
