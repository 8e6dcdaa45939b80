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


class LoadFailures:
    """Times are ticks. Waits double with every failure, up to MAX_BACKOFF_TICKS."""

    def __init__(self) -> None:
        self._failures: dict[tuple[str, CopyKey], _Failure] = {}

    def __bool__(self) -> bool:
        return bool(self._failures)

    def record(self, node_id: str, key: CopyKey, why: str, tick: int) -> bool:
        """Whether placement should avoid the pair from now on."""
        place = (node_id, key)
        count = self._failures[place].count + 1 if place in self._failures else 1
        retry = tick + min(2**count, MAX_BACKOFF_TICKS)
        self._failures[place] = _Failure(count, why, retry, tick)
        return count >= FAILURES_TO_FORBID

    def succeeded(self, node_id: str, key: CopyKey) -> None:
        self._failures.pop((node_id, key), None)

    def may_retry(self, node_id: str, key: CopyKey, tick: int) -> bool:
        failure = self._failures.get((node_id, key))
        return failure is None or tick >= failure.retry_tick

    def forbidden(self) -> frozenset[tuple[AdapterId, str]]:
        """Pairs of adapter and node that failed too often lately."""
        return frozenset(
            (key[0], node_id)
            for (node_id, key), f in self._failures.items()
            if f.count >= FAILURES_TO_FORBID
        )

    def why(self, key: CopyKey) -> str | None:
        """What went wrong with a revision, on the first node where it did."""
        for (node_id, failed), failure in sorted(self._failures.items(), key=lambda i: i[0]):
            if failed == key:
                return f"loading failed on {node_id}: {failure.why}"
        return None

    def forget_node(self, node_id: str) -> None:
        self._keep(lambda place, _: place[0] != node_id)

    def forget_adapter(self, adapter: AdapterId) -> None:
        self._keep(lambda place, _: place[1][0] != adapter)

    def forget_before(self, tick: int) -> None:
        self._keep(lambda _, failure: failure.last_tick >= tick)

    def _keep(self, wanted: Callable[[tuple[str, CopyKey], _Failure], bool]) -> None:
        self._failures = {p: f for p, f in self._failures.items() if wanted(p, f)}
