"""Which node gets a request. Pure: the table, the clock and the randomness are given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loraserve.client.route_table import Holder, NodeRoute, RevisionRoute, RouteTable
from loraserve.errors import InvalidArgumentError
from loraserve.v1 import common_pb2

_REFUSING = (common_pb2.RESIDENCY_STATE_DRAINING, common_pb2.RESIDENCY_STATE_FAILED)
_MIB = 1 << 20


@dataclass(frozen=True)
class CostWeights:
    """What is worth how many prompt tokens of prefill."""

    running_request: float = 8.0
    queued_request: float = 32.0
    host_install_per_mib: float = 2.0
    fetch: float = 256.0
    fetch_per_mib: float = 16.0
    pages_full: float = 1024.0
    """A node without a free page, which must preempt; in proportion from 10 % free pages on."""
    request_steps: float = 256.0
    """Steps that a request stays in a batch: in each it slows the others by its rank."""


@dataclass(frozen=True)
class ObservedLoad:
    """A node's load as it reported it with an answer."""

    running_requests: int = 0
    queued_requests: int = 0
    queued_prefill_tokens: int = 0
    free_pages: int = 0
    total_pages: int = 0
    rank_sum: int = 0
    max_rank: int = 0


@dataclass(frozen=True)
class RouteRequest:
    """Nodes to `avoid` failed this very request. `spill`: a node that does not hold the adapter
    may be asked to load it, where no holder is left. `hinted`: the holders by the word of a node
    that knows more than the table, whose holders then do not count; None where the table is the
    newest."""

    base: str = ""
    adapter: str | None = None
    revision: str | None = None
    avoid: frozenset[str] = frozenset()
    spill: bool = True
    hinted: frozenset[str] | None = None


@dataclass
class _NodeView:
    """What this client knows of a node beside the table."""

    incarnation: int
    load: ObservedLoad = field(default_factory=ObservedLoad)
    observed_at: float = float("-inf")
    # Own requests that run there: when they were sent, their prompt tokens and rank.
    own: dict[int, tuple[float, int, int]] = field(default_factory=dict)
    failures: int = 0
    failed_until: float = float("-inf")
    # The last request that was sent before the last failure.
    failed_ticket: int = 0


class Router:
    """Picks among the holders of an adapter by power of two choices.

    Two candidates are drawn by weight; the one with less work ahead per weight gets the request,
    the first drawn where both have none, so that idle nodes share by weight. Comparing two instead
    of taking the best of all keeps many clients with the same stale view from all running to one
    node.

    Where the table has `rank_costs`, every adapter is nearly everywhere and only routing decides
    which ranks meet: then RANK_CHOICES are drawn, and the work ahead is the predicted cost of the
    node's step with the request in it, from the ranks that the node reported and the own requests'.
    """

    RANK_CHOICES = 8
    LOAD_HALF_LIFE_S = 2.0
    """An observed load is believed less the older it is: a node that once was busy, and is not
    asked any more for it, must become a choice again."""
    FIRST_COOL_DOWN_S = 1.0
    MAX_COOL_DOWN_S = 30.0

    def __init__(
        self,
        clock: Callable[[], float],
        random: Callable[[], float],
        table: RouteTable | None = None,
        weights: CostWeights | None = None,
    ) -> None:
        """`clock`: seconds, never back. `random`: uniform in [0, 1)."""
        self._clock = clock
        self._random = random
        self._weights = weights or CostWeights()
        self._views: dict[str, _NodeView] = {}
        self._tickets = 0
        self.table = RouteTable()
        self.set_table(table or RouteTable())

    def set_table(self, table: RouteTable) -> None:
        """A node that is new or restarted starts without a record of failures."""
        views = {}
        for node in table.nodes.values():
            view = self._views.get(node.node_id)
            if view is None or view.incarnation < node.incarnation:
                view = _NodeView(node.incarnation)
            views[node.node_id] = view
        self.table, self._views = table, views

    # What requests report

    def rank_of(self, request: RouteRequest) -> int:
        """Of the adapter; 0 where the table does not tell. Raises InvalidArgumentError where the
        base must be named."""
        if request.adapter is None:
            return 0
        found = self.table.find(request.base, request.adapter)
        route = found.of(request.revision) if found else None
        return route.max_rank if route else 0

    def began(self, node_id: str, prompt_tokens: int, rank: int = 0) -> int:
        """A request was sent to the node; the ticket that `ended` takes."""
        self._tickets += 1
        view = self._views.get(node_id)
        if view is not None:
            view.own[self._tickets] = (self._clock(), prompt_tokens, rank)
        return self._tickets

    def ended(self, node_id: str, ticket: int) -> None:
        view = self._views.get(node_id)
        if view is not None:
            view.own.pop(ticket, None)

    def observe(self, node_id: str, load: ObservedLoad) -> None:
        """The node said how loaded it is."""
        view = self._views.get(node_id)
        if view is not None:
            view.load, view.observed_at = load, self._clock()

    def pages(self) -> tuple[int, int]:
        """(in use, all) of the nodes, as each told last."""
        loads = [view.load for view in list(self._views.values())]
        total = sum(load.total_pages for load in loads)
        return total - sum(load.free_pages for load in loads), total

    def answered(self, node_id: str, ticket: int) -> None:
        """The node answers the request of the ticket. One that was sent before a failure tells
        nothing: a node that drains goes on with what it has and refuses what is new."""
        view = self._views.get(node_id)
        if view is not None and ticket > view.failed_ticket:
            view.failures, view.failed_until = 0, float("-inf")

    def failed(self, node_id: str) -> None:
        """The node was lost or refused: nothing goes there for a while, longer with every failure
        in a row, as long as another can serve."""
        view = self._views.get(node_id)
        if view is None:
            return
        now = self._clock()
        view.failed_ticket = self._tickets
        # Requests that fail together tell of one failure.
        if now >= view.failed_until:
            view.failures += 1
        exponent = min(view.failures - 1, 10) if view.failures else 0
        for_s = min(self.FIRST_COOL_DOWN_S * 2.0**exponent, self.MAX_COOL_DOWN_S)
        view.failed_until = max(view.failed_until, now + for_s)

    # The choice

    def has_holder(self, request: RouteRequest) -> bool:
        """Whether some node that takes requests, and is not to be avoided, serves the adapter now.

        Raises InvalidArgumentError where the base must be named."""
        if request.adapter is not None and not self.table.every_node:
            found = self.table.find(request.base, request.adapter)
            route = found.of(request.revision) if found else None
            return bool(self._holders(route, request, ""))
        return bool(self._anywhere(request, ""))

    def pick(self, request: RouteRequest) -> NodeRoute | None:
        """The node for the request, None where there is none.

        Healthy holders first, then healthy nodes that would have to load the adapter, then nodes
        that failed lately. Costs O(holders) as long as one of them is healthy. Raises
        InvalidArgumentError where the base must be named.
        """
        base, route = request.base, None
        if request.adapter is not None:
            found = self.table.find(base, request.adapter)
            if found is not None:
                base, route = found.adapter.base, found.of(request.revision)
        if not base:
            self._check_one_base(request)
        size, rank = (route.size_bytes, route.max_rank) if route else (0, 0)
        placed = request.adapter is not None and not self.table.every_node
        holders = self._holders(route, request, base) if placed else self._anywhere(request, base)
        healthy = [h for h in holders if self._healthy(h.node_id)]
        if healthy:
            return self.table.nodes[self._best_of_some(healthy, size, rank)]
        held = {h.node_id for h in holders}
        others = self._anywhere(request, base) if placed and request.spill else []
        others = [h for h in others if h.node_id not in held]
        healthy_others = [h for h in others if self._healthy(h.node_id)]
        for group in (healthy_others, holders, others):
            if group:
                return self.table.nodes[self._best_of_some(group, size, rank)]
        return None

    def _usable(self, node: NodeRoute | None, request: RouteRequest, base: str) -> bool:
        return (
            node is not None
            and not node.draining
            and node.node_id not in request.avoid
            and (not base or node.base in ("", base))
        )

    def _anywhere(self, request: RouteRequest, base: str) -> list[Holder]:
        """Every node that might serve the request, by id."""
        return [
            Holder(node_id, 1, common_pb2.RESIDENCY_STATE_UNSPECIFIED)
            for node_id, node in sorted(self.table.nodes.items())
            if self._usable(node, request, base)
        ]

    def routed(self, request: RouteRequest, node_id: str) -> bool:
        """Whether the table, or a hint that is newer, names the node as a holder of the adapter."""
        if request.adapter is None or self.table.every_node:
            return False
        if request.hinted is not None:
            return node_id in request.hinted
        found = self.table.find(request.base, request.adapter)
        route = found.of(request.revision) if found else None
        return route is not None and any(h.node_id == node_id for h in route.holders)

    def _check_one_base(self, request: RouteRequest) -> None:
        """Any node would do, and its answer would be that of whatever base it serves."""
        bases = self.table.bases() - {""}
        if len(bases) > 1:
            unknown = f", no route of {request.adapter!r} tells it" if request.adapter else ""
            raise InvalidArgumentError(
                "base", f"must be named{unknown}; nodes serve {', '.join(sorted(bases))}"
            )

    def _holders(
        self, route: RevisionRoute | None, request: RouteRequest, base: str
    ) -> list[Holder]:
        nodes = self.table.nodes
        if request.hinted is not None:
            # The table's weights are of another time.
            return [
                Holder(node_id, 1, common_pb2.RESIDENCY_STATE_UNSPECIFIED)
                for node_id in sorted(request.hinted)
                if self._usable(nodes.get(node_id), request, base)
            ]
        if route is None:
            return []
        return [
            h
            for h in route.holders
            if h.weight > 0
            and h.state not in _REFUSING
            and self._usable(nodes.get(h.node_id), request, base)
        ]

    def _healthy(self, node_id: str) -> bool:
        return self._clock() >= self._views[node_id].failed_until

    def _draw(self, holders: Sequence[Holder]) -> int:
        """An index, by weight."""
        point = self._random() * sum(h.weight for h in holders)
        for index, holder in enumerate(holders):
            point -= holder.weight
            if point < 0:
                return index
        return len(holders) - 1

    def _best_of_some(self, group: Sequence[Holder], size_bytes: int, rank: int) -> str:
        rest, drawn = list(group), []
        for _ in range(self.RANK_CHOICES if self.table.rank_costs else 2):
            if rest:
                drawn.append(rest.pop(self._draw(rest)))
        if len(drawn) == 1:
            return drawn[0].node_id
        # Ties go to the first draw.
        return min(drawn, key=lambda h: self.cost(h, size_bytes, rank) / h.weight).node_id

    def cost(self, holder: Holder, size_bytes: int = 0, rank: int = 0) -> float:
        """What is ahead of a new request on the node, in prompt tokens; 0 where it is idle. `rank`:
        of the request, which counts where the table has `rank_costs`."""
        w, view, now = self._weights, self._views[holder.node_id], self._clock()
        load = view.load
        trust: float = 0.5 ** ((now - view.observed_at) / self.LOAD_HALF_LIFE_S)
        unseen = [own for own in view.own.values() if own[0] >= view.observed_at]
        cost = trust * load.queued_prefill_tokens + sum(tokens for _, tokens, _ in unseen)
        running = max(trust * load.running_requests + len(unseen), len(view.own))
        cost += w.running_request * running + w.queued_request * trust * load.queued_requests
        costs = self.table.rank_costs
        if costs is not None:
            ranks = [r for _, _, r in view.own.values()]
            # A part of the largest rank means nothing: it is believed or not.
            believed = now - view.observed_at <= self.LOAD_HALF_LIFE_S
            largest = max(load.max_rank if believed else 0, *ranks, 0)
            ahead = running * largest
            # In each step from now on, all are padded to what is largest with the request.
            added = (running + 1) * max(largest, rank) - ahead
            own = max(trust * load.rank_sum + sum(r for _, _, r in unseen), sum(ranks))
            slowed = costs.own * own + costs.padded * (ahead + w.request_steps * added)
            cost += w.running_request * slowed
        if load.total_pages:
            free = load.free_pages / load.total_pages
            cost += w.pages_full * trust * max(0.0, 1.0 - 10.0 * free)
        mib = size_bytes / _MIB
        if holder.state in (
            common_pb2.RESIDENCY_STATE_PENDING,
            common_pb2.RESIDENCY_STATE_FETCHING,
            common_pb2.RESIDENCY_STATE_DISK,
        ):
            cost += w.fetch + w.fetch_per_mib * mib
        elif holder.state == common_pb2.RESIDENCY_STATE_HOST:
            cost += w.host_install_per_mib * mib
        return cost
