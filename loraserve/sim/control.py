"""The controller in simulated time: the daemon's own core, fed with events, and its effects."""

from collections.abc import Callable, Iterable, Sequence

import loraserve.client.route_table as client_routes
from loraserve.controller.events import (
    AskRegister,
    Effect,
    Event,
    NodeRegistered,
    PublishRoutes,
    SendDrop,
    SendLoad,
    Tick,
)
from loraserve.controller.routes import RouteTable
from loraserve.controller.state import ControllerState, Settings
from loraserve.placement.load import LoadModel
from loraserve.placement.types import AdapterSpec, PlacementPolicy
from loraserve.sim.cluster_node import ClusterNode

Command = SendLoad | SendDrop


def client_table(
    table: RouteTable, rank_costs: client_routes.RankCosts | None = None
) -> client_routes.RouteTable:
    """What the wire makes of the controller's table at a client."""
    return client_routes.RouteTable(
        table.epoch,
        table.version,
        {
            adapter: client_routes.AdapterRoute(
                adapter,
                route.revision,
                tuple(
                    client_routes.RevisionRoute(
                        r.revision,
                        tuple(
                            client_routes.Holder(h.node_id, h.weight, h.state.value)
                            for h in r.holders
                        ),
                        r.max_rank,
                        r.size_bytes,
                    )
                    for r in route.revisions
                ),
                route.unrouted_reason,
            )
            for adapter, route in table.adapters.items()
        },
        {
            node_id: client_routes.NodeRoute(
                node_id, n.address, n.draining, n.incarnation, n.base, n.base_digest
            )
            for node_id, n in table.nodes.items()
        },
        rank_costs=rank_costs,
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
        self._rank_costs = rank_costs
        self.settings = settings
        self.commands = 0
        self._state = ControllerState(settings, policy, 1, [(spec,) for spec in specs], load=load)
        self._send = send
        self._publish = publish

    def step(self, event: Event) -> list[Effect]:
        effects = self._state.step(event)
        published = False
        for effect in effects:
            if isinstance(effect, SendLoad | SendDrop):
                self.commands += 1
                self._send(effect)
            elif isinstance(effect, PublishRoutes):
                published = True
        if published:
            self._publish(client_table(self._state.routes, self._rank_costs))
        return effects

    def register(self, node: ClusterNode) -> None:
        self.step(NodeRegistered(node.record()))
        self.step(node.beat())

    def hear(self, node: ClusterNode) -> None:
        """One heartbeat of a node; one that is not known registers first."""
        for effect in self.step(node.beat()):
            if isinstance(effect, AskRegister):
                self.register(node)

    def tick(self, nodes: Iterable[ClusterNode]) -> None:
        """One period: every live node's heartbeat, then time."""
        for node in nodes:
            if node.alive:
                self.hear(node)
        self.step(Tick())
