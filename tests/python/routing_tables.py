"""Route tables in few words, and a router with a clock to turn and seeded dice."""

import random
from collections import Counter
from collections.abc import Sequence

from loraserve.client.route_table import (
    AdapterRoute,
    Holder,
    NodeRoute,
    RevisionRoute,
    RouteTable,
)
from loraserve.client.routing import CostWeights, Router, RouteRequest
from loraserve.placement.types import AdapterId
from loraserve.v1.common_pb2 import RESIDENCY_STATE_DEVICE

DEVICE = RESIDENCY_STATE_DEVICE
SQL_ID = AdapterId("default", "base", "sql")
SQL = RouteRequest("base", "sql")
BASE_MODEL = RouteRequest("base")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def holder(node_id: str, weight: int = 1, state: int = DEVICE) -> Holder:
    return Holder(node_id, weight, state)


def adapter(*holders: Holder, name: str = "sql", base: str = "base", size: int = 0) -> AdapterRoute:
    revisions = (RevisionRoute("r1", holders, 8, size),) if holders else ()
    return AdapterRoute(AdapterId("default", base, name), "r1", revisions)


def node(
    node_id: str, draining: bool = False, incarnation: int = 1, base: str = "base"
) -> NodeRoute:
    return NodeRoute(node_id, f"{node_id}:1", draining, incarnation, base)


def table(nodes: str | Sequence[NodeRoute], *adapters: AdapterRoute) -> RouteTable:
    """`nodes`: one letter each, or whole."""
    whole = [node(n) for n in nodes] if isinstance(nodes, str) else nodes
    return RouteTable(1, 1, {a.adapter: a for a in adapters}, {n.node_id: n for n in whole})


class Site:
    def __init__(self, routes: RouteTable, weights: CostWeights | None = None) -> None:
        self.clock = Clock()
        self.router = Router(self.clock, random.Random(7).random, routes, weights)

    def picks(self, request: RouteRequest = SQL, count: int = 200) -> Counter[str | None]:
        """Who is picked, `count` times, where nothing changes between the picks."""
        found = (self.router.pick(request) for _ in range(count))
        return Counter(n.node_id if n else None for n in found)

    def only(self, request: RouteRequest = SQL) -> str | None:
        """Who is picked every time."""
        (one,) = self.picks(request, 50)
        return one

    def answer(self, node_id: str) -> None:
        """The node answers a request that is sent to it now."""
        ticket = self.router.began(node_id, 1)
        self.router.answered(node_id, ticket)
        self.router.ended(node_id, ticket)

    def fail(self, node_id: str) -> float:
        """The node fails; for how long it then gets nothing while another can serve."""
        self.router.failed(node_id)
        start = self.clock.now
        while node_id not in self.picks(BASE_MODEL, 60):
            self.clock.now += 0.25
        return self.clock.now - start
