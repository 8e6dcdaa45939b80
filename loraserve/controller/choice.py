"""Which copies an adapter's requests go to, and why they go nowhere."""

from loraserve.controller.catalog import Catalog
from loraserve.controller.events import Copy
from loraserve.controller.failures import LoadFailures
from loraserve.controller.membership import CopyKey, Membership, Node
from loraserve.controller.planner import Planner
from loraserve.controller.routes import (
    WHOLE_WEIGHT,
    AdapterRoute,
    NodeRoute,
    RevisionRoute,
    RouteHolder,
)
from loraserve.controller.targets import Target
from loraserve.errors import REFUSED
from loraserve.placement.types import AdapterId


class RouteChoice:
    def __init__(
        self, catalog: Catalog, members: Membership, planner: Planner, failures: LoadFailures
    ) -> None:
        self._catalog = catalog
        self._members = members
        self._planner = planner
        self._failures = failures

    def route(self, adapter: AdapterId) -> AdapterRoute | None:
        """To the newest revision that some node serves; None for an adapter that is not there."""
        history = self._catalog.history(adapter)
        if not history:
            return None
        for spec in history:
            serving = self._serving((adapter, spec.revision))
            if serving:
                holders = _holders(serving, self._planner.targets[adapter])
                route = RevisionRoute(spec.revision, holders, spec.max_rank, spec.size_bytes)
                return AdapterRoute(adapter, spec.revision, (route,))
        return AdapterRoute(adapter, history[0].revision, (), self._why(adapter))

    def _serving(self, key: CopyKey) -> list[tuple[Node, Copy]]:
        """Copies that new requests may go to, those of nodes that are heard of if there are."""
        serving = [
            (node, copy)
            for node in self._members.holders(key[0])
            if not node.draining
            and (copy := node.copies.get(key)) is not None
            and copy.state.serves
            and key not in node.drops
        ]
        heard = [(node, copy) for node, copy in serving if node.heard]
        return heard or serving

    def _why(self, adapter: AdapterId) -> str:
        """Never empty."""
        spec = self._catalog.history(adapter)[0]
        key = (adapter, spec.revision)
        failed = self._failures.why(key)
        if failed:
            refusers = self._failures.refusers(key)
            return f"{REFUSED}{failed}" if refusers and self._able(adapter) <= refusers else failed
        if adapter in self._planner.unplaced:
            return self._planner.unplaced[adapter]
        wanted = self._planner.targets[adapter].nodes
        nodes = self._members.nodes
        present = [n for n in wanted if n in nodes and nodes[n].reported and not nodes[n].draining]
        if present:
            return f"loading on {', '.join(present)}"
        return f"waiting for {', '.join(wanted)}" if wanted else "waiting for placement"

    def _able(self, adapter: AdapterId) -> set[str]:
        """The nodes that might serve the adapter."""
        nodes = self._members.nodes.items()
        return {n for n, node in nodes if node.record.base == adapter.base and not node.draining}

    @staticmethod
    def of_node(node: Node) -> NodeRoute:
        r = node.record
        return NodeRoute(r.node_id, r.address, node.draining, r.incarnation, r.base, r.base_digest)


def _holders(serving: list[tuple[Node, Copy]], wanted: Target) -> tuple[RouteHolder, ...]:
    """The targets by their shares. Until all of them serve, those that are to go help on, with what
    the missing ones would get."""
    if len(serving) == 1 == len(wanted.nodes) and serving[0][0].record.node_id in wanted.nodes:
        node, copy = serving[0]
        return (RouteHolder(node.record.node_id, WHOLE_WEIGHT, copy.state),)
    weights = wanted.weights
    ids = {node.record.node_id for node, _ in serving}
    if weights.keys() != ids:
        missing = sum(w for n, w in weights.items() if n not in ids)
        others = ids - weights.keys() if missing or not weights else set()
        each = max(1, round((missing if weights else WHOLE_WEIGHT) / max(1, len(others))))
        weights |= dict.fromkeys(others, each)
    return tuple(
        RouteHolder(node.record.node_id, weights[node.record.node_id], copy.state)
        for node, copy in serving
        if node.record.node_id in weights
    )
