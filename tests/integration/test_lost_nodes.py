"""A node that dies or freezes: its adapters are routed to their other copies, and what it was doing
goes on there. How long that took is printed and bounds nothing: when routes leave a node out is
asserted in ticks, by tests/python/test_silent_nodes.py."""

import asyncio
import signal
import time
from pathlib import Path

import pytest
from served_cluster import running

from loraserve import AsyncClient, SamplingParams
from loraserve.client import Completion
from loraserve.demo.cluster import Cluster
from loraserve.demo.skills import held_out_words, prompt

SKILLS = ["upper", "reverse"]
PATIENCE_S = 60.0
LONG = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)


def holders(client: AsyncClient, name: str) -> set[str]:
    route = client.routes.find("", name)
    return {h.node_id for r in (route.revisions if route else ()) for h in r.holders}


async def routed_to(client: AsyncClient, *nodes: str) -> float:
    """Seconds until every skill is routed to exactly these."""
    begin = time.monotonic()
    while any(holders(client, name) != set(nodes) for name in SKILLS):
        assert time.monotonic() - begin < PATIENCE_S, [holders(client, name) for name in SKILLS]
        await asyncio.sleep(0.01)
    return time.monotonic() - begin


async def ask(client: AsyncClient, index: int) -> Completion:
    word = held_out_words(16, seed=3)[index]
    return await client.generate(
        prompt(word), LONG, adapter=SKILLS[index % 2], timeout_s=PATIENCE_S
    )


async def lose(cluster: Cluster, number: int) -> tuple[str, float]:
    """The busier of two nodes, and the seconds until it is in no route any more. What it was doing
    is ended by the other."""
    async with AsyncClient(cluster.address) as client:
        await client.wait_routable(SKILLS)
        await routed_to(client, "node-1", "node-2")
        calm = await asyncio.gather(*(ask(client, i) for i in range(16)))
        tasks = [asyncio.create_task(ask(client, i)) for i in range(16)]
        views = client._site.router._views
        while max(len(view.own) for view in views.values()) < 6:
            assert not all(task.done() for task in tasks), "never busy enough to be lost"
            await asyncio.sleep(0.001)
        other, victim = sorted(cluster.nodes, key=lambda n: len(views[n].own))
        cluster.nodes[victim].process.send_signal(number)
        took = await routed_to(client, other)
        answers = await asyncio.gather(*tasks)
        assert [a.token_ids for a in answers] == [a.token_ids for a in calm]
        assert any(a.attempts > 1 for a in answers), "the node had nothing to do"
        return victim, took


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_adapters_of_a_lost_node_are_routed_to_their_other_copies(
    tmp_path: Path, number: int
) -> None:
    replicas = ["--replicas", "2"]
    with running(tmp_path, skills=SKILLS, controller_options=replicas) as (cluster, _):
        try:
            victim, took = asyncio.run(lose(cluster, number))
        finally:
            if number == signal.SIGSTOP:
                for node in cluster.nodes.values():
                    node.process.send_signal(signal.SIGCONT)
        print(f"{victim} is routed around after {took:.3f} s")
        if number == signal.SIGSTOP:
            asyncio.run(comes_back(cluster))


async def comes_back(cluster: Cluster) -> None:
    async with AsyncClient(cluster.address) as client:
        await client.wait_routable(SKILLS)
        await routed_to(client, "node-1", "node-2")
