"""Loads and drops that bring the nodes from what they hold to what is wanted of them.

A copy moves in steps that follow from what nodes report, so that a controller which starts in the
middle goes on with them: load at the target; routes go to it (`choice.py`); the copy that is in no
route any more is dropped after a delay, when its requests have ended. Invariants:
 - a copy is dropped only if another one serves its adapter in the published routes, on a node that
   is heard of, so that the last copy that serves never goes;
 - loads for adapters that are served stay within the budget of the interval; others never wait;
 - a load that finds no room waits for drops, and only then is the node asked to decide.
"""

from collections.abc import Callable, Iterable

from loraserve.controller.catalog import Catalog
from loraserve.controller.events import Copy, SendDrop, SendLoad
from loraserve.controller.failures import LoadFailures
from loraserve.controller.membership import CopyKey, Membership, Node, SentDrop, SentLoad
from loraserve.controller.peers import PeerChoice
from loraserve.controller.residency import Residency
from loraserve.controller.routes import AdapterRoute
from loraserve.controller.settings import Settings
from loraserve.controller.targets import Targets
from loraserve.controller.timers import Timers
from loraserve.placement.types import AdapterId, AdapterSpec


class Moves:
    """`timers` are set for whatever waits for time alone."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        members: Membership,
        targets: Targets,
        failures: LoadFailures,
        timers: Timers,
        peers: PeerChoice,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._members = members
        self._targets = targets
        self._failures = failures
        self._timers = timers
        self._peers = peers
        self._unrouted_since: dict[AdapterId, dict[tuple[str, str], int]] = {}
        # Loads that wait for the next interval's budget.
        self._postponed: set[AdapterId] = set()
        self.last_command = 0
        self.spent_bytes = 0

    def new_interval(self) -> set[AdapterId]:
        """Renews the budget; whose loads waited for it."""
        self.spent_bytes = 0
        waiting, self._postponed = self._postponed, set()
        return waiting

    def budget_left(self) -> int | None:
        limit = self._settings.move_bytes
        return None if limit is None else max(0, limit - self.spent_bytes)

    def _command(self) -> int:
        self.last_command += 1
        return self.last_command

    # Loads

    def loads(
        self, adapters: Iterable[AdapterId], tick: int, worth: Callable[[AdapterId], float]
    ) -> list[SendLoad]:
        """Loads to ask for now. Where the budget does not do for all, those of the highest `worth`
        per byte go first."""
        urgent: list[tuple[AdapterSpec, Node]] = []
        others: list[tuple[AdapterSpec, Node]] = []
        for adapter in adapters:
            spec = self._catalog.current(adapter)
            if spec is None:
                continue
            nodes = [self._members.nodes.get(n) for n in self._targets[adapter].nodes]
            wanting = [n for n in nodes if n and n.takes_loads and self._wants(n, spec, tick)]
            if not wanting:
                continue
            served = any(self._serves(n, spec) for n in self._members.holders(adapter))
            (others if served else urgent).extend((spec, node) for node in wanting)
        if self._settings.move_bytes is not None:
            others.sort(key=lambda o: -worth(o[0].adapter) / max(1, o[0].size_bytes))
        sent = [self._load(spec, node, tick, True) for spec, node in urgent]
        sent += [self._load(spec, node, tick, False) for spec, node in others]
        return [effect for effect in sent if effect is not None]

    def _serves(self, node: Node, spec: AdapterSpec) -> bool:
        """Whether some revision of the adapter serves there."""
        return not node.draining and any(
            copy.state.serves and key not in node.drops and self._catalog.revision(*key)
            for key, copy in node.copies_of(spec.adapter)
        )

    def _wants(self, node: Node, spec: AdapterSpec, tick: int) -> bool:
        key = (spec.adapter, spec.revision)
        node_id, copy = node.record.node_id, node.copies.get(key)
        if copy is not None and copy.state.present and key not in node.drops:
            node.cramped.pop(key, None)
            if copy.state.serves:
                self._failures.succeeded(node_id, key)
            return False
        sent = node.loads.get(key)
        if sent is not None and tick - sent.tick < self._settings.patience_ticks:
            self._timers.at(sent.tick + self._settings.patience_ticks, spec.adapter)
            return False
        retry = self._failures.retry_tick(node_id, key)
        if tick < retry:
            self._timers.at(retry, spec.adapter)
            return False
        return True

    def _load(self, spec: AdapterSpec, node: Node, tick: int, urgent: bool) -> SendLoad | None:
        key = (spec.adapter, spec.revision)
        again = key in node.loads  # paid for already
        if not again and not node.has_room(spec):
            since = node.cramped.setdefault(key, tick)
            if tick - since < self._settings.room_ticks:
                self._timers.at(since + self._settings.room_ticks, spec.adapter)
                return None
        if not (again or urgent or self._affords(spec)):
            self._postponed.add(spec.adapter)
            return None
        node.cramped.pop(key, None)
        self.spent_bytes += 0 if again else spec.size_bytes
        command = self._command()
        node.expect(key, SentLoad(command, tick, spec))
        self._timers.at(tick + self._settings.patience_ticks, spec.adapter)
        peers = self._peers.holders(key, node)
        if peers:
            self._peers.begin(node.record.node_id, key, peers[0].node_id, tick)
        return SendLoad(node.record.node_id, command, spec, peers)

    def _affords(self, spec: AdapterSpec) -> bool:
        """A copy larger than the whole budget goes alone in an interval of its own."""
        left = self.budget_left()
        return left is None or spec.size_bytes <= left or self.spent_bytes == 0

    # Drops

    def drops(self, adapter: AdapterId, route: AdapterRoute | None, tick: int) -> list[SendDrop]:
        """Drops to ask for now. `route`: as published."""
        since_of = self._unrouted_since.pop(adapter, {})
        unrouted: dict[tuple[str, str], int] = {}
        effects: list[SendDrop] = []
        for node in self._members.holders(adapter):
            node_id = node.record.node_id
            copies = node.copies_of(adapter)
            if len(copies) > 1:
                copies.sort(key=lambda item: item[0][1])
            for key, copy in copies:
                if node.draining or not self._superfluous(node_id, key, route):
                    continue
                since = since_of.get((node_id, key[1]), tick)
                unrouted[node_id, key[1]] = since
                if self._may_drop(node, key, copy, since, tick):
                    command = self._command()
                    node.drops[key] = SentDrop(command, tick)
                    self._timers.at(tick + self._settings.patience_ticks, adapter)
                    effects.append(SendDrop(node_id, command, *key))
        if unrouted:
            self._unrouted_since[adapter] = unrouted
        return effects

    def _may_drop(self, node: Node, key: CopyKey, copy: Copy, since: int, tick: int) -> bool:
        delay, patience = self._settings.drop_delay_ticks, self._settings.patience_ticks
        if tick - since < delay:
            self._timers.at(since + delay, key[0])
            return False
        sent = node.drops.get(key)
        if sent and tick - sent.tick < patience:
            self._timers.at(sent.tick + patience, key[0])
            return False
        return copy.state is not Residency.DRAINING

    def _superfluous(self, node_id: str, key: CopyKey, route: AdapterRoute | None) -> bool:
        """Whether the copy is neither wanted nor routed, and others serve its adapter."""
        adapter, revision = key
        spec = self._catalog.current(adapter)
        if spec is None or self._catalog.revision(adapter, revision) is None:
            # Removed from the cluster, and perhaps created anew: nobody may be answered from it.
            return True
        if revision == spec.revision and node_id in self._targets[adapter].nodes:
            return False
        routed = {
            (r.revision, h.node_id) for r in (route.revisions if route else ()) for h in r.holders
        }
        stands = any(self._members.nodes[n].heard for _, n in routed)
        return stands and (revision, node_id) not in routed
