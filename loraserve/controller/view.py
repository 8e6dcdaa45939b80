"""What the shell around the core may read of it, between two steps."""

from collections.abc import Mapping, Set

from loraserve.controller.catalog import Catalog
from loraserve.controller.events import Copy, CopyHolder
from loraserve.controller.membership import Membership, Node
from loraserve.controller.moves import Moves
from loraserve.controller.peers import PeerChoice
from loraserve.controller.planner import Planner
from loraserve.controller.reports import Reports
from loraserve.controller.routes import RouteTable, RouteWriter
from loraserve.controller.settings import Settings
from loraserve.controller.targets import Target, Targets
from loraserve.placement.autoscale import WantedNodes
from loraserve.placement.types import AdapterId, AdapterSpec


class StateView:
    """Read only. The core, which derives from it, owns and changes the parts."""

    _settings: Settings
    _tick: int
    _catalog: Catalog
    _members: Membership
    _moves: Moves
    _peers: PeerChoice
    _planner: Planner
    _reports: Reports
    _targets: Targets
    _writer: RouteWriter
    _awaited: Set[str]

    @property
    def routes(self) -> RouteTable:
        return self._writer.table

    @property
    def epoch(self) -> int:
        return self.routes.epoch

    @property
    def nodes(self) -> Mapping[str, Node]:
        return self._members.nodes

    @property
    def unrouted(self) -> int:
        """Adapters that no node serves."""
        return self._writer.unrouted

    @property
    def wanted(self) -> Mapping[str, WantedNodes]:
        """By base model: how many nodes the demand wants, and why."""
        return self._planner.wanted

    @property
    def utilisation(self) -> Mapping[str, float]:
        """By node, as placement predicted it last."""
        return self._planner.utilisation

    @property
    def ignored(self) -> Mapping[str, int]:
        """What nodes reported and could not be true, by reason."""
        return self._reports.ignored

    @property
    def placements(self) -> int:
        return self._planner.placements

    @property
    def failed_placements(self) -> Mapping[str, int]:
        """Those that came to nothing, by reason."""
        return self._planner.failed

    @property
    def moved_bytes(self) -> int:
        """Asked for in this placement interval."""
        return self._moves.spent_bytes

    def wanted_on(self, node_id: str) -> int:
        """Adapters that placement wants on the node."""
        return len(self._targets.on_node(node_id))

    def target(self, adapter: AdapterId) -> Target:
        return self._targets[adapter]

    def history(self, adapter: AdapterId) -> tuple[AdapterSpec, ...]:
        return self._catalog.history(adapter)

    def current(self, adapter: AdapterId) -> AdapterSpec | None:
        return self._catalog.current(adapter)

    def revision(self, adapter: AdapterId, revision: str) -> AdapterSpec | None:
        """The revision of the name, current or earlier."""
        return self._catalog.revision(adapter, revision)

    def copies(self, adapter: AdapterId) -> list[tuple[str, Copy]]:
        """(node id, copy) of every copy of the current revision, by node id."""
        spec = self.current(adapter)
        key = (adapter, spec.revision if spec else "")
        holders = self._members.holders(adapter)
        return [(n.record.node_id, n.copies[key]) for n in holders if key in n.copies]

    def peers(self, spec: AdapterSpec) -> tuple[CopyHolder, ...]:
        """Whom a node that does not hold the revision is to read it from, best first."""
        return self._peers.holders((spec.adapter, spec.revision))

    @property
    def settling(self) -> bool:
        """Whether the stored placement still waits for its nodes."""
        if self._tick >= self._settings.settle_ticks:
            return False
        return any(n not in self.nodes or not self.nodes[n].reported for n in self._awaited)
