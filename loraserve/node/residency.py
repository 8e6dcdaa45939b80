"""What of a node's residency its controller has been told: all of it once in every stream, then
what changed. A node with 25,000 copies would else fill a message with each heartbeat."""

from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from loraserve.node.convert import adapter_id_to_wire
from loraserve.placement.types import AdapterId
from loraserve.v1 import common_pb2, controller_pb2

# Of residency in one heartbeat; leaves room for demand and results below the limit of 4 MiB.
MAX_PART_BYTES = 2 << 20

K = TypeVar("K", bound=Hashable)
CopyKey = tuple[AdapterId, str]  # adapter and revision


class ChangeJournal(Generic[K]):
    """After which generation each key changed last. `generation` rises with every change."""

    def __init__(self, most: int = 100_000) -> None:
        """Of more than `most` keys the oldest changes are forgotten."""
        self.generation = 1
        self._most = most
        self._changes: dict[K, int] = {}  # in the order of their generations
        self._known_since = 1

    def changed(self, key: K) -> None:
        self.generation += 1
        self._changes.pop(key, None)
        self._changes[key] = self.generation
        if len(self._changes) > self._most:
            oldest = next(iter(self._changes))
            self._known_since = self._changes.pop(oldest)

    def since(self, generation: int) -> list[K] | None:
        """What changed after the generation, newest first; None where that is forgotten."""
        if generation < self._known_since:
            return None
        found = []
        for key in reversed(self._changes):
            if self._changes[key] <= generation:
                break
            found.append(key)
        return found


class Residency(Protocol):
    """What `HeldAdapters` shows of itself."""

    @property
    def generation(self) -> int: ...

    def residency(self) -> list[common_pb2.AdapterResidency]: ...

    def changes_since(
        self, generation: int
    ) -> tuple[list[common_pb2.AdapterResidency], list[CopyKey]] | None: ...


class ResidencyReport:
    """Of one heartbeat stream after the other."""

    def __init__(self, adapters: Residency, max_part_bytes: int = MAX_PART_BYTES) -> None:
        self._adapters = adapters
        self._max_part_bytes = max_part_bytes
        self._told = 0

    def restart(self) -> None:
        """The next report says everything: a stream begins, or the controller asks for it."""
        self._told = 0

    def parts(self) -> list[controller_pb2.HeartbeatRequest]:
        """Heartbeats with what is to be told now and nothing else; all but the last have `more`.
        They count as told."""
        since = self._told
        changes = self._adapters.changes_since(since) if since else None
        if changes is None:
            since, changes = 0, (self._adapters.residency(), [])
        self._told = generation = self._adapters.generation  # of what was just read
        copies, removed = changes
        made = [controller_pb2.HeartbeatRequest(generation=generation, since_generation=since)]
        size = 0
        for copy in copies:
            made, size = self._room(made, size, copy.ByteSize())
            made[-1].residency.append(copy)
        for adapter, revision in removed:
            key = controller_pb2.RevisionKey(adapter=adapter_id_to_wire(adapter), revision=revision)
            made, size = self._room(made, size, key.ByteSize())
            made[-1].removed.append(key)
        return made

    def _room(
        self, made: list[controller_pb2.HeartbeatRequest], size: int, more: int
    ) -> tuple[list[controller_pb2.HeartbeatRequest], int]:
        """A last part with room for `more` bytes, and its size with them."""
        more += 8
        if size + more <= self._max_part_bytes or not size:
            return made, size + more
        last = made[-1]
        last.more = True
        following = controller_pb2.HeartbeatRequest(
            generation=last.generation, since_generation=last.since_generation
        )
        return [*made, following], more
