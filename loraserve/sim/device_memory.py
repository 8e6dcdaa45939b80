"""The device's memory in tokens: KV cache and installed adapters share it."""

from collections import OrderedDict

from loraserve.sim.sequence import BASE_ONLY, AdapterTable


class DeviceMemory:
    """Adapters of running sequences are pinned; of the others the longest unused goes first where
    room is needed. `capacity` 0: no limit."""

    def __init__(self, capacity: int, adapters: AdapterTable) -> None:
        self.capacity = capacity
        self.kv_used = 0
        self.pinned: dict[int, int] = {}
        self._room = adapters.room
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._idle_room = 0
        self._adapter_room = 0

    @property
    def free(self) -> int:
        return self.capacity - self.kv_used - self._adapter_room

    @property
    def reachable(self) -> int:
        """Free, or held by adapters that may go."""
        return self.free + self._idle_room

    def holds(self, adapter: int) -> bool:
        return adapter in self._idle or adapter in self.pinned

    def install(self, adapter: int) -> bool:
        """False where there is no room."""
        room = self._room[adapter]
        if not self.make_room(room):
            return False
        self._adapter_room += room
        self._idle[adapter] = None
        self._idle_room += room
        return True

    def uninstall(self, adapter: int) -> None:
        """Frees the room of an adapter unless something runs with it."""
        if adapter in self._idle:
            del self._idle[adapter]
            self._idle_room -= self._room[adapter]
            self._adapter_room -= self._room[adapter]

    def pin(self, adapter: int) -> None:
        """Of an installed adapter; no effect for BASE_ONLY."""
        if adapter == BASE_ONLY:
            return
        count = self.pinned.get(adapter, 0)
        self.pinned[adapter] = count + 1
        if not count:
            del self._idle[adapter]
            self._idle_room -= self._room[adapter]

    def unpin(self, adapter: int) -> None:
        if adapter == BASE_ONLY:
            return
        count = self.pinned[adapter] - 1
        if count:
            self.pinned[adapter] = count
        else:
            del self.pinned[adapter]
            self._idle[adapter] = None
            self._idle_room += self._room[adapter]

    def make_room(self, tokens: int) -> bool:
        """Evicts idle adapters until so many tokens are free; none in vain."""
        if not self.capacity or self.free >= tokens:
            return True
        if self.free + self._idle_room < tokens:
            return False
        while self.free < tokens:
            self.uninstall(next(iter(self._idle)))
        return True
