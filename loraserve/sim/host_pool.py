"""The adapters in one node's host memory, and the link over which they come."""

from dataclasses import dataclass

from loraserve.controller.events import Residency
from loraserve.sim.sequence import AdapterTable, SimSequence


@dataclass(frozen=True)
class LinkSettings:
    """Of one node's adapter transfers, one after the other. The defaults are of a 100 Gb/s network
    at half its line rate, and of an object store."""

    peer_bytes_per_s: float = 6e9
    store_bytes_per_s: float = 1e9
    latency_s: float = 0.005


class HostPool:
    """Copies by adapter: FETCHING, then HOST, DRAINING while requests still use what is to go.
    Requests wait here for the copy that they need, in their adapter's own queue."""

    def __init__(self, capacity: int, adapters: AdapterTable, link: LinkSettings) -> None:
        self.capacity = capacity
        self.copies: dict[int, Residency] = {}
        self.used_bytes = 0
        self.fetched_bytes = 0
        # Rises with every change of `copies`.
        self.generation = 0
        self.waiting: dict[int, list[SimSequence]] = {}
        self._sizes = adapters.sizes
        self._link = link
        self._link_free_s = 0.0
        self._users: dict[int, int] = {}

    def serves(self, adapter: int) -> bool:
        return self.copies.get(adapter) in (Residency.HOST, Residency.DRAINING)

    def fetch(self, adapter: int, now_s: float, from_peer: bool) -> float | None:
        """Begins to fetch an adapter that is not there; when it will have come, None where there is
        no room for it."""
        size = self._sizes[adapter]
        if self.used_bytes + size > self.capacity:
            return None
        link = self._link
        speed = link.peer_bytes_per_s if from_peer else link.store_bytes_per_s
        begin_s = max(now_s, self._link_free_s)
        self._link_free_s = begin_s + link.latency_s + size / speed
        self.fetched_bytes += size
        self.used_bytes += size
        self._set(adapter, Residency.FETCHING)
        return self._link_free_s

    def arrived(self, adapter: int) -> list[SimSequence]:
        """The copy is there: the requests that waited for it."""
        self._set(adapter, Residency.HOST)
        return self.waiting.pop(adapter, [])

    def put(self, adapter: int) -> None:
        """A copy that takes no time: before the simulation begins."""
        self.used_bytes += self._sizes[adapter]
        self._set(adapter, Residency.HOST)

    def keep(self, adapter: int) -> None:
        """A copy that was to go is wanted again."""
        self._set(adapter, Residency.HOST)

    def drop(self, adapter: int) -> bool:
        """Whether the copy went at once; else it goes when its last request ends."""
        if self.copies.get(adapter) is Residency.FETCHING or self._users.get(adapter):
            # A fetch under way is let come: the controller drops it again.
            if self.copies[adapter] is Residency.HOST:
                self._set(adapter, Residency.DRAINING)
            return False
        if adapter in self.copies:
            self.used_bytes -= self._sizes[adapter]
            del self.copies[adapter]
            self.generation += 1
        return True

    def use(self, adapter: int) -> None:
        self._users[adapter] = self._users.get(adapter, 0) + 1

    def unuse(self, adapter: int) -> bool:
        """Whether a copy that was to go has gone with its last request."""
        self._users[adapter] -= 1
        if self._users[adapter]:
            return False
        del self._users[adapter]
        if self.copies.get(adapter) is Residency.DRAINING:
            return self.drop(adapter)
        return False

    def lose_everything(self) -> list[SimSequence]:
        """The node died: the requests that waited."""
        lost = [s for queue in self.waiting.values() for s in queue]
        self.copies, self.waiting, self._users = {}, {}, {}
        self.used_bytes = 0
        self._link_free_s = 0.0
        self.generation = 0
        return lost

    def _set(self, adapter: int, state: Residency) -> None:
        self.copies[adapter] = state
        self.generation += 1
