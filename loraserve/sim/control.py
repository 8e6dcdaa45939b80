"""The controller in simulated time: the daemon's own core, fed with events, and its effects."""

from collections.abc import Callable, Iterable, Sequence

import loraserve.client.route_table as client_routes
from loraserve.controller.events import (
    AskRegister,
    AskResidency,
    Effect,
    Event,
    NodeRegistered,
    PublishRoutes,
    SendDrop,
    SendLoad,
    Tick,
)
from loraserve.controller.routes import AdapterRoute, NodeRoute, RouteTable
from loraserve.controller.state import ControllerState, Settings
from loraserve.placement.load import LoadModel
from loraserve.placement.types import AdapterSpec, PlacementPolicy
from loraserve.sim.cluster_node import ClusterNode

Command = SendLoad | SendDrop


def client_route(route: AdapterRoute) -> client_routes.AdapterRoute:
    """What the wire makes of the controller's route at a client."""
    return client_routes.AdapterRoute(
        route.adapter,
        route.revision,
        tuple(
            client_routes.RevisionRoute(
                r.revision,
                tuple(client_routes.Holder(h.node_id, h.weight, h.state.value) for h in r.holders),
                r.max_rank,
                r.size_bytes,
            )
            for r in route.revisions
        ),
        route.unrouted_reason,
    )


def client_node(n: NodeRoute) -> client_routes.NodeRoute:
    return client_routes.NodeRoute(
        n.node_id, n.address, n.draining, n.incarnation, n.base, n.base_digest
    )


class ClientTable:
    """The table that clients have made of the deltas so far."""

    def __init__(self, table: RouteTable, rank_costs: client_routes.RankCosts | None) -> None:
        self._epoch = table.epoch
        self._rank_costs = rank_costs
        self._adapters = {a: client_route(r) for a, r in table.adapters.items()}
        self._nodes = {n: client_node(r) for n, r in table.nodes.items()}

    def take(self, publish: PublishRoutes) -> client_routes.RouteTable:
        delta = publish.delta
        self._adapters = {**self._adapters, **{r.adapter: client_route(r) for r in delta.adapters}}
        self._nodes = {**self._nodes, **{n.node_id: client_node(n) for n in delta.nodes}}
        for adapter in delta.removed_adapters:
            del self._adapters[adapter]
        for node_id in delta.removed_nodes:
            del self._nodes[node_id]
        return client_routes.RouteTable(
            self._epoch,
            publish.version,
            self._adapters,
            self._nodes,
            rank_costs=self._rank_costs,
        )


class Control:
    """`send` carries a command to its node; `publish` a new route table to the clients."""

    def __init__(
        self,
        settings: Settings,
        policy: PlacementPolicy,
        load: LoadModel,
        specs: Sequence[AdapterSpec],
        send: Callable[[Command], None],
        publish: Callable[[client_routes.RouteTable], None],
        rank_costs: client_routes.RankCosts | None = None,
    ) -> None:
        self.settings = settings
        self.commands = 0
        self._state = ControllerState(settings, policy, 1, [(spec,) for spec in specs], load=load)
        self._table = ClientTable(self._state.routes, rank_costs)
        self._send = send
        self._publish = publish

    def step(self, event: Event) -> list[Effect]:
        effects = self._state.step(event)
        table = None
        for effect in effects:
            if isinstance(effect, SendLoad | SendDrop):
                self.commands += 1
                self._send(effect)
            elif isinstance(effect, PublishRoutes):
                table = self._table.take(effect)
        if table is not None:
            self._publish(table)
        return effects

    def register(self, node: ClusterNode) -> None:
        self.step(NodeRegistered(node.record()))
        self.step(node.beat(whole=True))

    def hear(self, node: ClusterNode) -> None:
        """One heartbeat of a node; one that is not known registers first."""
        for effect in self.step(node.beat()):
            if isinstance(effect, AskRegister):
                self.register(node)
            elif isinstance(effect, AskResidency):
                self.step(node.beat(whole=True))

    def tick(self, nodes: Iterable[ClusterNode]) -> None:
        """One period: every live node's heartbeat, then time."""
        for node in nodes:
            if node.alive:
                self.hear(node)
        self.step(Tick())
