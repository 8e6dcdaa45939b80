"""Where the adapters went that were dropped here: what a node tells those who still come for them.

A node must not keep the routes of the whole cluster. It remembers what the controller said with the
drop, of the last few thousand drops.
"""

from collections import OrderedDict
from dataclasses import dataclass

from loraserve.errors import StaleRouteError
from loraserve.node.residency import CopyKey
from loraserve.placement.types import AdapterId

MAX_ENTRIES = 10_000


@dataclass(frozen=True)
class Moved:
    """The node ids that held the revision by routes of `version`, (epoch, version)."""

    holders: tuple[str, ...]
    version: tuple[int, int]


class MovedAdapters:
    """Bounded: the oldest entry goes first. Lives on the event loop."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._moved: OrderedDict[CopyKey, Moved] = OrderedDict()

    def __len__(self) -> int:
        return len(self._moved)

    def note(self, key: CopyKey, moved: Moved) -> None:
        """The copy was dropped."""
        self._moved.pop(key, None)
        self._moved[key] = moved
        if len(self._moved) > self._max_entries:
            self._moved.popitem(last=False)

    def forget(self, key: CopyKey) -> None:
        """The copy is wanted here again."""
        self._moved.pop(key, None)

    def refusal(
        self, adapter: AdapterId, revision: str | None, routes: tuple[int, int]
    ) -> StaleRouteError:
        """What a request is told that routes of this (epoch, version) have brought here in vain:
        of a drop, only where it is newer."""
        moved = self._moved.get((adapter, revision)) if revision else None
        message = f"{adapter.name!r} is not on this node (any more)"
        if moved is None or routes >= moved.version:
            return StaleRouteError("adapter", message)
        return StaleRouteError("adapter", message, moved.holders, moved.version)
