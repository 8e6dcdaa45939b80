"""What ranks cost, from the controller's profile to the choice that a client makes."""

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from controller_fixtures import TICK_S, FakeNode, Site, controller

from loraserve import AsyncClient
from loraserve.client.route_table import RankCosts
from loraserve.client.routing import ObservedLoad, RouteRequest
from loraserve.controller.state import Settings
from loraserve.placement.load import DEFAULT_PROFILE, LoadModel

# Of an engine that pads: a token of a batch costs as much as two hundred of its ranks.
COST = replace(DEFAULT_PROFILE.cost, decode_token_s=4e-5, token_rank_s=0.0, token_max_rank_s=2e-7)
LOAD = LoadModel(replace(DEFAULT_PROFILE, cost=COST, padded=True))
SQL = RouteRequest("base", "sql")


async def known_on(client: AsyncClient, nodes: int) -> None:
    """The client's table has the adapter on so many nodes."""
    await client.wait_routable(["sql"])
    while [len(r.holders) for a in client.routes.adapters.values() for r in a.revisions] != [nodes]:
        await asyncio.sleep(0.01)


async def picks(site: Site, client: AsyncClient) -> Counter[str]:
    """Of 200 requests of rank 64, where one node runs rank 64 and the other rank 8."""
    async with FakeNode(site, "n1"), FakeNode(site, "n2"):
        await site.create("sql", b"PACKED base 64 x")
        await known_on(client, 2)
        router = client._site.router
        router.observe("n1", ObservedLoad(running_requests=4, rank_sum=256, max_rank=64))
        router.observe("n2", ObservedLoad(running_requests=4, rank_sum=32, max_rank=8))
        chosen = [router.pick(SQL) for _ in range(200)]
    return Counter(node.node_id for node in chosen if node is not None)


@pytest.mark.parametrize("policy", ["request_level", "rank_aware"])
def test_ranks_decide_only_where_the_policy_leaves_it_to_routing(
    tmp_path: Path, policy: str
) -> None:
    settings = Settings(tick_seconds=TICK_S, silent_ticks=500, replicas=2)

    async def run() -> None:
        async with controller(tmp_path, policy=policy, load=LOAD, settings=settings) as site:
            key = site.keys["acme"]
            async for message in site.watch("acme"):
                assert message.full
                assert message.HasField("rank_costs") == (policy == "request_level")
                break
            async with AsyncClient(site.server.address, api_key=key) as client:
                chosen = await picks(site, client)
                costs = client.routes.rank_costs
                if policy == "request_level":
                    assert costs == RankCosts(0.0, pytest.approx(2e-7 / 4e-5))
                    assert chosen == {"n1": 200}
                else:
                    assert costs is None

    asyncio.run(asyncio.wait_for(run(), 120))
