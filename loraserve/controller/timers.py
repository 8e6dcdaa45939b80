"""Adapters that want to be looked at again at a later tick, though nothing happens to them."""

from loraserve.placement.types import AdapterId


class Timers:
    """A timer is never taken back: to look in vain costs little."""

    def __init__(self) -> None:
        self._at: dict[int, set[AdapterId]] = {}

    def at(self, tick: int, adapter: AdapterId) -> None:
        self._at.setdefault(tick, set()).add(adapter)

    def due(self, tick: int) -> set[AdapterId]:
        """Those of this tick, once; called for every tick."""
        return self._at.pop(tick, set())
