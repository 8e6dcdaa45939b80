"""Routes after a restart: who had some keeps them until the nodes have said what they hold."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from controller_fixtures import FakeNode, controller

from loraserve.controller.events import Tick
from loraserve.controller.state import Settings

# Nothing but what the test does changes anything.
STILL = Settings(tick_seconds=3600.0, settle_ticks=4)


def holders(message: Any) -> list[str]:
    return [h.node_id for a in message.adapters for r in a.revisions for h in r.holders]


async def first(watch: Any) -> Any:
    try:
        return await anext(watch)
    finally:
        await watch.aclose()


async def one_life(directory: Path) -> tuple[dict[str, int], dict[str, str], FakeNode]:
    """What a watcher has seen of a controller that had one adapter on one node."""
    async with controller(directory, settings=STILL) as site:
        node = FakeNode(site, "n1")
        await node.__aenter__()
        await site.create("a", b"PACKED base 8 a")
        await site.served("a", ["n1"])
        message = await first(site.watch("acme"))
        assert holders(message) == ["n1"]
        await node.kill()
        known = {"known_epoch": message.epoch, "known_version": message.version}
        return known, site.keys, node


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_watcher_of_the_life_before_waits_for_the_nodes(tmp_path: Path, comes_back: bool) -> None:
    async def run() -> None:
        known, keys, node = await one_life(tmp_path)
        async with controller(tmp_path, keys=keys, settings=STILL) as site:
            waiting = asyncio.create_task(first(site.watch("acme", **known)))
            # A new one hears at once what there is.
            fresh = await first(site.watch("acme"))
            assert fresh.full
            assert holders(fresh) == []
            await asyncio.sleep(0.1)
            assert not waiting.done()
            if not comes_back:
                # Not for ever: the node may be gone.
                for _ in range(STILL.settle_ticks):
                    assert not waiting.done()
                    await site.server.runtime.apply(Tick())
                assert holders(await waiting) == []
                return
            node.site, node.commands = site, []
            await node.__aenter__()
            message = await waiting
            assert message.epoch > known["known_epoch"]
            assert message.full
            assert holders(message) == ["n1"]
            await node.kill()

    asyncio.run(asyncio.wait_for(run(), 120))
