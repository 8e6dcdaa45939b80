"""A client with old routes, against real daemons."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from served_cluster import running

from loraserve import AsyncClient, SamplingParams
from loraserve.client import request_run
from loraserve.client.route_table import AdapterRoute, Holder, RevisionRoute, RouteTable
from loraserve.demo import MODEL_NAME, adapter_directory
from loraserve.demo.skills import prompt

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


def with_other_holder(table: RouteTable, name: str) -> tuple[RouteTable, str, str]:
    """The table with a node as the only holder that is none; that node and the true holder."""
    route = table.find("", name)
    assert route is not None
    (revision,) = route.revisions
    (holder,) = revision.holders
    (wrong,) = table.nodes.keys() - {holder.node_id}
    old = RevisionRoute(revision.revision, (Holder(wrong, 100, holder.state),))
    adapters = {
        **table.adapters,
        route.adapter: AdapterRoute(route.adapter, route.revision, (old,)),
    }
    made = RouteTable(table.epoch, table.version - 1, adapters, table.nodes)
    return made, wrong, holder.node_id


def test_old_routes_lead_to_the_holder_and_no_copy_is_loaded_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However long the routes take on a busy machine, the request waits for them.
    monkeypatch.setattr(request_run, "NEWER_ROUTES_WAIT_S", 60.0)
    turned_away = asyncio.Event()
    redirected = request_run.RequestRun._redirected

    async def seen(self: Any, error: Any, node: Any) -> None:
        turned_away.set()
        await redirected(self, error, node)

    monkeypatch.setattr(request_run.RequestRun, "_redirected", seen)
    with running(tmp_path, skills=["upper"]) as (cluster, client):

        async def ask() -> tuple[str, str, int, str]:
            async with AsyncClient(cluster.address) as stale:
                await stale.wait_routable(["upper"])
                old, wrong, right = with_other_holder(stale.routes, "upper")
                stale._site.router.set_table(old)
                task = asyncio.create_task(
                    stale.generate(prompt("word"), GREEDY, adapter="upper", timeout_s=180)
                )
                await asyncio.wait_for(turned_away.wait(), 120)
                assert not task.done()
                # Any change brings this client the routes as they are.
                await asyncio.to_thread(
                    client.adapters.add, "late", adapter_directory("stars"), base=MODEL_NAME
                )
                answer = await task
                assert answer.node_id == right
                return answer.text, wrong, answer.attempts, right

        text, wrong, attempts, right = asyncio.run(ask())
        assert (text, attempts) == ("WORD", 2)
        assert [node for node, _ in client.adapters.get("upper").holders] == [right]
        log = cluster.nodes[wrong].log.read_text()
        assert "upper revision" not in log


def test_routes_that_stay_old_end_in_a_load_on_demand(tmp_path: Path) -> None:
    """As where the controller is gone and nobody hears anything new."""
    with running(tmp_path, skills=["upper"]) as (cluster, _):

        async def ask() -> None:
            async with AsyncClient(cluster.address) as stale:
                await stale.wait_routable(["upper"])
                old, wrong, right = with_other_holder(stale.routes, "upper")
                stale._site.router.set_table(old)
                answer = await stale.generate(
                    prompt("word"), GREEDY, adapter="upper", timeout_s=120
                )
                assert answer.text == "WORD"
                assert answer.attempts == 2
                assert answer.node_id in (wrong, right)

        asyncio.run(ask())
