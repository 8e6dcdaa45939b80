"""The copies that a node holds, and what the controller is told of them."""

from collections import Counter
from collections.abc import Callable, Iterator

from loraserve.node.held import DEVICE, HOST, HeldAdapter
from loraserve.node.residency import ChangeJournal, CopyKey
from loraserve.placement.types import AdapterId
from loraserve.v1 import common_pb2


class HeldTable:
    """By adapter and revision. Event loop only, but for `count_by_state`."""

    def __init__(
        self, in_pages: Callable[[], frozenset[str]], on_change: Callable[[], None]
    ) -> None:
        """`in_pages`: engine names of what is in pages now. `on_change` is called whenever
        `generation` has risen."""
        self._in_pages = in_pages
        self._on_change = on_change
        self._held: dict[AdapterId, dict[str, HeldAdapter]] = {}
        self._journal: ChangeJournal[CopyKey] = ChangeJournal()
        self._installed: frozenset[str] = frozenset()

    def _all(self) -> Iterator[HeldAdapter]:
        for copies in self._held.values():
            yield from copies.values()

    def residency(self) -> list[common_pb2.AdapterResidency]:
        """Everything that the node holds, fetches or failed to load. `generation`, read after it,
        is that of what it returns."""
        self._see_installed()
        return [self._to_wire(held) for held in self._all()]

    def _to_wire(self, held: HeldAdapter) -> common_pb2.AdapterResidency:
        return held.to_wire(held.engine_name in self._installed)

    def _see_installed(self) -> None:
        """What the engine put into pages or took out of them is a change, but none that is worth a
        heartbeat of its own."""
        installed = self._in_pages()
        moved = installed ^ self._installed
        self._installed = installed
        if moved:
            for held in self._all():
                if held.engine_name in moved:
                    self._journal.changed((held.spec.adapter, held.spec.revision))

    def count_by_state(self) -> Counter[int]:
        """Copies by ResidencyState. The only method that other threads may call."""
        installed = self._in_pages()
        return Counter(
            DEVICE if h.state == HOST and h.engine_name in installed else h.state
            for copies in list(self._held.values())
            for h in list(copies.values())
        )

    def copies(self, adapter: AdapterId) -> list[HeldAdapter]:
        return list(self._held.get(adapter, {}).values())

    @property
    def generation(self) -> int:
        """Rises with every change of the residency."""
        return self._journal.generation

    def changes_since(
        self, generation: int
    ) -> tuple[list[common_pb2.AdapterResidency], list[CopyKey]] | None:
        """Copies that changed after the generation, and keys of those that went; None where that
        is not known any more. `generation`, read after it, is that of what it returns."""
        self._see_installed()
        keys = self._journal.since(generation)
        if keys is None:
            return None
        found = [self._held.get(adapter, {}).get(revision) for adapter, revision in keys]
        gone = [key for key, held in zip(keys, found, strict=True) if held is None]
        return [self._to_wire(held) for held in found if held is not None], gone

    def _changed(self, held: HeldAdapter) -> None:
        self._journal.changed((held.spec.adapter, held.spec.revision))
        self._on_change()

    def _forget(self, held: HeldAdapter) -> None:
        copies = self._held.get(held.spec.adapter, {})
        if copies.get(held.spec.revision) is held:
            del copies[held.spec.revision]
            if not copies:
                del self._held[held.spec.adapter]
            self._changed(held)
