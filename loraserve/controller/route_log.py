"""The last changes of the route table, so that a watcher hears what changed since its version."""

from collections import deque
from dataclasses import dataclass
from itertools import islice

from loraserve.controller.routes import RouteDelta, RouteTable
from loraserve.placement.types import AdapterId

# Entries of all deltas together; a watcher that is further behind gets the whole table.
MAX_ENTRIES = 200_000


@dataclass(frozen=True)
class RouteChanges:
    """`table` is the newest. `changed`: keys of its entries that changed or went since the version
    that the watcher has; None: it needs the whole table."""

    table: RouteTable
    changed: "ChangedKeys | None"


@dataclass(frozen=True)
class ChangedKeys:
    adapters: frozenset[AdapterId]
    nodes: frozenset[str]


def keys_of(delta: RouteDelta) -> ChangedKeys:
    return ChangedKeys(
        frozenset((*(r.adapter for r in delta.adapters), *delta.removed_adapters)),
        frozenset((*(n.node_id for n in delta.nodes), *delta.removed_nodes)),
    )


class RouteLog:
    """Versions follow one another without a gap."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._entries = 0
        self._newest = 0
        self._deltas: deque[tuple[int, int, ChangedKeys]] = deque()

    def add(self, version: int, delta: RouteDelta) -> None:
        self._deltas.append((version, len(delta), keys_of(delta)))
        self._entries += len(delta)
        self._newest = version
        while self._entries > self._max_entries:
            self._entries -= self._deltas.popleft()[1]

    def since(self, version: int) -> ChangedKeys | None:
        """What changed after the version; None where that is not known any more."""
        if version > self._newest:
            return None
        oldest = self._deltas[0][0] if self._deltas else self._newest + 1
        if version < oldest - 1:
            return None
        count = self._newest - version
        if count == 1:
            return self._deltas[-1][2]
        adapters: set[AdapterId] = set()
        nodes: set[str] = set()
        for _, _, keys in islice(reversed(self._deltas), count):
            adapters |= keys.adapters
            nodes |= keys.nodes
        return ChangedKeys(frozenset(adapters), frozenset(nodes))
