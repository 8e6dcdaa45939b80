"""A cluster in simulated time: one heap of events over nodes, clients and the controller.

The controller's core and the clients' router are the product's own; engines follow a cost model.
Left out: CPU time of controller and clients, the prefix cache, and whether an adapter is on a
node's device or in its host memory, which nodes of the product report and these do not.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from loraserve.client.retry import TRANSPORT_FIELD, RetryBudget, RetryPolicy, RetryState
from loraserve.client.route_table import RankCosts, RouteTable
from loraserve.client.routing import Router, RouteRequest
from loraserve.controller.events import Residency, SendDrop, SendLoad
from loraserve.controller.state import Settings
from loraserve.errors import InvalidArgumentError, UnavailableError
from loraserve.placement.cost_model import Profile, Slo
from loraserve.placement.load import LoadModel
from loraserve.placement.types import AdapterId, AdapterSpec, PlacementPolicy
from loraserve.security.identity import DEFAULT_TENANT
from loraserve.sim.cluster_node import ClusterNode
from loraserve.sim.control import Command, Control
from loraserve.sim.host_pool import HostPool, LinkSettings
from loraserve.sim.metrics import Meter, request_work_s
from loraserve.sim.node_model import EngineSettings, NodeEngine
from loraserve.sim.sequence import AdapterTable, SimSequence
from loraserve.sim.warm_up import warm_up
from loraserve.sim.workload import Workload

# Among events at the same time, in this order: what comes from outside sees the state before a step
# ends, as a request that arrives in the moment of a step's end is in the next step.
_ARRIVAL, _STEP, _TICK = range(3)
_RETRY = RetryPolicy()


@dataclass(frozen=True)
class Failure:
    """A node dies and comes back, empty, after `down_s`."""

    time_s: float
    node: int
    down_s: float = 60.0


@dataclass(frozen=True)
class ClusterSettings:
    """`clients`: gateways that keep a view of the nodes each. `drain_s`: how long after the last
    arrival requests may still finish. `warm`: the controller has known the demand of the first
    interval, and placed for it, before time 0."""

    nodes: int = 8
    host_bytes: int = 256 << 30
    control: Settings = field(default_factory=Settings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    link: LinkSettings = field(default_factory=LinkSettings)
    slo: Slo = field(default_factory=Slo)
    clients: int = 4
    network_s: float = 0.0005
    retry_s: float = 0.25
    drain_s: float = 300.0
    warm: bool = True
    failures: tuple[Failure, ...] = ()
    seed: int = 0


class Cluster:
    """One run. `run` may be called once."""

    def __init__(
        self,
        workload: Workload,
        profile: Profile,
        policy: PlacementPolicy,
        load: LoadModel,
        settings: ClusterSettings,
        by_rank: bool = False,
    ) -> None:
        """`load` is what the controller believes; the engines follow `profile`. `by_rank`: the
        clients choose between nodes by ranks too, and know what ranks cost on the engine."""
        if settings.nodes < 1:
            raise InvalidArgumentError("nodes", f"{settings.nodes} is not at least 1")
        if settings.clients < 1:
            raise InvalidArgumentError("clients", f"{settings.clients} is not at least 1")
        for failure in settings.failures:
            if not 0 <= failure.node < settings.nodes:
                raise InvalidArgumentError("failures", f"there is no node {failure.node}")
        self.now_s = 0.0
        self._workload = workload
        self._profile = profile
        self._settings = settings
        self.meter = Meter(settings.slo)
        self.adapters = AdapterTable.of(
            workload.ranks, profile.bytes_per_rank, profile.kv_token_bytes
        )
        base = profile.base
        self._specs = [
            AdapterSpec(AdapterId(DEFAULT_TENANT, base, name), "r1", size, rank)
            for name, size, rank in zip(
                workload.adapter_names, self.adapters.sizes, workload.ranks, strict=True
            )
        ]
        self._index = {spec.adapter: i for i, spec in enumerate(self._specs)}
        self._asked = [RouteRequest(base, spec.adapter.name) for spec in self._specs]
        self.nodes: list[ClusterNode] = []
        for index in range(settings.nodes):
            self.nodes.append(self._node(index))
        self._by_id = {node.node_id: node for node in self.nodes}
        self._control = Control(
            settings.control,
            policy,
            load,
            self._specs,
            self._send,
            self._publish,
            RankCosts(*profile.cost.per_rank()) if by_rank else None,
        )
        rng = random.Random(settings.seed)
        self._routers = [
            Router(self._clock, random.Random(rng.random()).random) for _ in range(settings.clients)
        ]
        self._heap: list[tuple[float, int, int, Callable[[Any], None], Any]] = []
        self._pushed = 0
        self._at_once = True
        self._left = len(workload)
        self._work_s = [0.0] * settings.nodes
        self._moved_before = 0
        self.events = 0

    def _clock(self) -> float:
        return self.now_s

    def _node(self, index: int) -> ClusterNode:
        pool = HostPool(self._settings.host_bytes, self.adapters, self._settings.link)
        engine = NodeEngine(
            self._profile,
            self.adapters,
            self._settings.engine,
            self._settings.slo,
            self.meter.gaps,
            on_first_token=lambda sequence: self._first_token(node, sequence),
            on_finish=lambda sequence: self._finish(node, sequence),
        )
        node = ClusterNode(index, self._profile.base, engine, pool, self._specs)
        return node

    @property
    def bytes_moved(self) -> int:
        """Fetched by nodes since time 0."""
        return sum(node.pool.fetched_bytes for node in self.nodes) - self._moved_before

    # The run

    def run(self) -> None:
        self._start()
        for failure in self._settings.failures:
            self._push(failure.time_s, _TICK, self._fail, failure)
        self._push(self._settings.control.tick_seconds, _TICK, self._tick, None)
        heap, pop = self._heap, heapq.heappop
        last_s = self._workload.duration_s + self._settings.drain_s
        clients = len(self._routers)
        for order, request in enumerate(self._workload):
            while heap and heap[0][0] < request.time_s:
                self.now_s, _, _, handle, argument = pop(heap)
                self.events += 1
                handle(argument)
            self.now_s = request.time_s
            sequence = SimSequence(order, request)
            sequence.router = order % clients
            self.events += 1
            self._route(sequence)
        while heap and self._left and heap[0][0] <= last_s:
            self.now_s, _, _, handle, argument = pop(heap)
            self.events += 1
            handle(argument)
        self._close_window()

    def _push(
        self, time_s: float, kind: int, handle: Callable[[Any], None], argument: object
    ) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (time_s, kind, self._pushed, handle, argument))

    def _start(self) -> None:
        """Everything is in place at time 0: adapters that are placed are loaded."""
        warm_up(
            self._control,
            self.nodes,
            self._specs,
            self._workload if self._settings.warm else None,
        )
        self._at_once = False
        self._moved_before = sum(node.pool.fetched_bytes for node in self.nodes)

    # Clients

    def _route(self, sequence: SimSequence) -> None:
        router = self._routers[sequence.router]
        request = self._asked[sequence.adapter]
        if sequence.avoid:
            request = replace(request, avoid=sequence.avoid)
        chosen = router.pick(request)
        if chosen is None:
            sequence.avoid = frozenset()
            self._push(self.now_s + self._settings.retry_s, _ARRIVAL, self._route, sequence)
            return
        node = self._by_id[chosen.node_id]
        rank = self._workload.ranks[sequence.adapter]
        sequence.ticket = router.began(node.node_id, sequence.tokens, rank)
        self._push(self.now_s + self._settings.network_s, _ARRIVAL, self._reach, (node, sequence))

    def _reach(self, argument: tuple[ClusterNode, SimSequence]) -> None:
        node, sequence = argument
        pool, adapter = node.pool, sequence.adapter
        if not node.alive:
            self._retry(node, sequence)
            return
        if not pool.serves(adapter):
            if adapter not in pool.copies and not self._fetch(node, adapter):
                self._routers[sequence.router].ended(node.node_id, sequence.ticket)
                sequence.avoid |= {node.node_id}
                self._route(sequence)
                return
            pool.use(adapter)
            pool.waiting.setdefault(adapter, []).append(sequence)
            return
        pool.use(adapter)
        self._submit(node, sequence)

    def _submit(self, node: ClusterNode, sequence: SimSequence) -> None:
        node.count_prefill(sequence)
        try:
            node.engine.submit(self.now_s, sequence)
        except InvalidArgumentError:
            node.pool.unuse(sequence.adapter)
            self._routers[sequence.router].ended(node.node_id, sequence.ticket)
            self._lose(sequence)
            return
        node.takes(self._workload.ranks[sequence.adapter])
        self._schedule(node)

    def _retry(self, node: ClusterNode, sequence: SimSequence) -> None:
        """The node is gone: once more elsewhere, with the tokens so far as part of the prompt."""
        router = self._routers[sequence.router]
        router.ended(node.node_id, sequence.ticket)
        router.failed(node.node_id)
        if sequence.retry is None:
            sequence.retry = RetryState(_RETRY, RetryBudget(_RETRY))
        wait_s = sequence.retry.after(
            UnavailableError(TRANSPORT_FIELD, "the node is lost"),
            progress=sequence.generated > sequence.sent_generated,
            started=sequence.generated > 0,
        )
        if wait_s is None:
            self._lose(sequence)
            return
        self.meter.retries += 1
        sequence.sent_generated = sequence.generated
        sequence.avoid = frozenset({node.node_id})
        soon_s = self.now_s + self._settings.network_s + wait_s
        self._push(soon_s, _ARRIVAL, self._route, sequence)

    def _lose(self, sequence: SimSequence) -> None:
        self.meter.lost += 1
        self._left -= 1

    def _first_token(self, node: ClusterNode, sequence: SimSequence) -> None:
        sequence.first_token_s += self._settings.network_s
        router = self._routers[sequence.router]
        router.answered(node.node_id, sequence.ticket)
        router.observe(node.node_id, node.load())

    def _finish(self, node: ClusterNode, sequence: SimSequence) -> None:
        node.count_decode(sequence)
        node.gives_back(self._workload.ranks[sequence.adapter])
        if node.pool.unuse(sequence.adapter):
            node.engine.memory.uninstall(sequence.adapter)
            self._wake(node)
        router = self._routers[sequence.router]
        router.ended(node.node_id, sequence.ticket)
        router.observe(node.node_id, node.load())
        self._work_s[node.index] += request_work_s(self._profile, self.adapters, sequence)
        self.meter.finished.append(sequence)
        self._left -= 1

    # Nodes

    def _schedule(self, node: ClusterNode) -> None:
        end_s = node.engine.end_s
        if end_s is not None and end_s != node.scheduled_s:
            node.scheduled_s = end_s
            self._push(end_s, _STEP, self._step, node)

    def _step(self, node: ClusterNode) -> None:
        if node.engine.end_s == self.now_s:  # else it was made earlier, or the node died
            node.engine.complete(self.now_s)
            self._schedule(node)

    def _fetch(self, node: ClusterNode, adapter: int) -> bool:
        from_peer = any(n.pool.serves(adapter) for n in self.nodes if n.alive and n is not node)
        if self._at_once:
            node.pool.put(adapter)
            return True
        arrival_s = node.pool.fetch(adapter, self.now_s, from_peer)
        if arrival_s is None:
            return False
        self._push(arrival_s, _ARRIVAL, self._arrived, (node, adapter, node.incarnation))
        return True

    def _arrived(self, argument: tuple[ClusterNode, int, int]) -> None:
        node, adapter, incarnation = argument
        if not node.alive or node.incarnation != incarnation:
            return
        for sequence in node.pool.arrived(adapter):
            self._submit(node, sequence)
        self._wake(node)

    def _wake(self, node: ClusterNode) -> None:
        """Something changed that the controller should hear of before the period is over."""
        if not node.wakes:
            node.wakes = True
            soon_s = self.now_s + min(0.2, self._settings.control.tick_seconds / 2)
            self._push(soon_s, _TICK, self._hear, node)

    def _hear(self, node: ClusterNode) -> None:
        node.wakes = False
        if node.alive:
            self._control.hear(node)

    def _fail(self, failure: Failure) -> None:
        node = self.nodes[failure.node]
        if node.alive:
            for sequence in node.crash(self.now_s):
                self._retry(node, sequence)
        self._push(self.now_s + failure.down_s, _TICK, self._recover, node)

    def _recover(self, node: ClusterNode) -> None:
        if not node.alive:
            node.restart()
            self._control.register(node)

    # The controller

    def _send(self, command: Command) -> None:
        node = self._by_id[command.node_id]
        if not node.alive:
            return
        node.applied_command = max(node.applied_command, command.command_id)
        if isinstance(command, SendLoad):
            adapter = self._index[command.spec.adapter]
            if node.pool.copies.get(adapter) is Residency.DRAINING:
                node.pool.keep(adapter)
            elif adapter not in node.pool.copies and not self._fetch(node, adapter):
                node.failed_commands.append((command.command_id, "no host memory is left"))
        else:
            self._drop(node, command)

    def _drop(self, node: ClusterNode, command: SendDrop) -> None:
        adapter = self._index[command.adapter]
        if node.pool.drop(adapter):
            node.engine.memory.uninstall(adapter)

    def _publish(self, table: RouteTable) -> None:
        if self._at_once:
            self._take_table(table)
        else:
            self._push(self.now_s + self._settings.network_s, _ARRIVAL, self._take_table, table)

    def _take_table(self, table: RouteTable) -> None:
        for router in self._routers:
            router.set_table(table)

    def _tick(self, _: None) -> None:
        control = self._settings.control
        self._control.tick(self.nodes)
        self.meter.held_bytes.append(sum(node.pool.used_bytes for node in self.nodes))
        if len(self.meter.held_bytes) % control.placement_interval_ticks == 0:
            self._close_window()
        self._push(self.now_s + control.tick_seconds, _TICK, self._tick, None)

    def _close_window(self) -> None:
        self.meter.work_s.append(self._work_s)
        self._work_s = [0.0] * len(self.nodes)
