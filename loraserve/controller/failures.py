"""Loads that failed, per node and revision: when to try again, and which pairs to avoid."""

from collections.abc import Callable
from dataclasses import dataclass

from loraserve.controller.membership import CopyKey
from loraserve.placement.types import AdapterId

# Failed loads of an adapter on a node before placement avoids the pair.
FAILURES_TO_FORBID = 2
MAX_BACKOFF_TICKS = 60


@dataclass
class _Failure:
    count: int
    why: str
    retry_tick: int
    last_tick: int
    refused: bool


_Place = tuple[str, str]  # node id and revision


class LoadFailures:
    """Times are ticks. Waits double with every failure, up to MAX_BACKOFF_TICKS."""

    def __init__(self) -> None:
        self._failures: dict[AdapterId, dict[_Place, _Failure]] = {}

    def record(
        self, node_id: str, key: CopyKey, why: str, tick: int, refused: bool = False
    ) -> bool:
        """Whether placement should avoid the pair from now on. `refused`: as in Copy."""
        adapter, revision = key
        known = self._failures.setdefault(adapter, {})
        before = known.get((node_id, revision))
        count = before.count + 1 if before else 1
        retry = tick + min(2**count, MAX_BACKOFF_TICKS)
        known[node_id, revision] = _Failure(count, why, retry, tick, refused)
        return count >= FAILURES_TO_FORBID

    def succeeded(self, node_id: str, key: CopyKey) -> None:
        if key[0] in self._failures:
            self._keep({key[0]}, lambda place, _: place != (node_id, key[1]))

    def retry_tick(self, node_id: str, key: CopyKey) -> int:
        """From when on a load may be tried; 0 where none failed."""
        failure = self._failures.get(key[0], {}).get((node_id, key[1]))
        return failure.retry_tick if failure else 0

    def forbidden(self) -> frozenset[tuple[AdapterId, str]]:
        """Pairs of adapter and node that failed too often lately."""
        return frozenset(
            (adapter, node_id)
            for adapter, known in self._failures.items()
            for (node_id, _), failure in known.items()
            if failure.count >= FAILURES_TO_FORBID
        )

    def forbidden_for(self, adapter: AdapterId) -> frozenset[tuple[AdapterId, str]]:
        """Those of `forbidden` that are the adapter's."""
        known = self._failures.get(adapter, {})
        return frozenset(
            (adapter, n) for (n, _), f in known.items() if f.count >= FAILURES_TO_FORBID
        )

    def why(self, key: CopyKey) -> str | None:
        """What went wrong with a revision, on the first node where it did."""
        known = self._failures.get(key[0])
        if known is None:
            return None
        for (node_id, revision), failure in sorted(known.items(), key=lambda item: item[0]):
            if revision == key[1]:
                return f"loading failed on {node_id}: {failure.why}"
        return None

    def refusers(self, key: CopyKey) -> frozenset[str]:
        """The nodes that can never load the revision, as they found."""
        known = self._failures.get(key[0], {})
        return frozenset(
            n for (n, revision), f in known.items() if revision == key[1] and f.refused
        )

    def forget_node(self, node_id: str) -> set[AdapterId]:
        """Which adapters had failed there."""
        return self._keep(set(self._failures), lambda place, _: place[0] != node_id)

    def forget_adapter(self, adapter: AdapterId) -> None:
        self._failures.pop(adapter, None)

    def forget_before(self, tick: int) -> set[AdapterId]:
        """Which adapters had failed last before the tick."""
        return self._keep(set(self._failures), lambda _, failure: failure.last_tick >= tick)

    def _keep(
        self, adapters: set[AdapterId], wanted: Callable[[_Place, _Failure], bool]
    ) -> set[AdapterId]:
        changed = set()
        for adapter in adapters:
            known = self._failures[adapter]
            kept = {place: f for place, f in known.items() if wanted(place, f)}
            if len(kept) < len(known):
                changed.add(adapter)
                self._failures[adapter] = kept
            if not kept:
                del self._failures[adapter]
        return changed
