"""The adapters of the cluster, as the core knows them: names and their revisions."""

from collections.abc import Iterable, Iterator

from loraserve.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from loraserve.placement.types import AdapterId, AdapterSpec

# Revisions of a name that can be served or returned to.
MAX_HISTORY = 8


class Catalog:
    """Of each adapter its revisions, newest first; the first is what the name points to."""

    def __init__(self, histories: Iterable[tuple[AdapterSpec, ...]]) -> None:
        self._histories: dict[AdapterId, tuple[AdapterSpec, ...]] = {}
        for history in histories:
            if history[0].adapter in self._histories:
                raise AlreadyExistsError("adapter", f"{history[0].adapter} is there twice")
            self._histories[history[0].adapter] = history

    def __contains__(self, adapter: AdapterId) -> bool:
        return adapter in self._histories

    def __iter__(self) -> Iterator[AdapterId]:
        return iter(self._histories)

    def __len__(self) -> int:
        return len(self._histories)

    def history(self, adapter: AdapterId) -> tuple[AdapterSpec, ...]:
        """Empty where the adapter is unknown."""
        return self._histories.get(adapter, ())

    def current(self, adapter: AdapterId) -> AdapterSpec | None:
        history = self._histories.get(adapter)
        return history[0] if history else None

    def revision(self, adapter: AdapterId, revision: str) -> AdapterSpec | None:
        return next((s for s in self.history(adapter) if s.revision == revision), None)

    def specs(self) -> list[AdapterSpec]:
        """What every name points to."""
        return [history[0] for history in self._histories.values()]

    def add(self, spec: AdapterSpec) -> None:
        """Raises AlreadyExistsError, InvalidArgumentError."""
        if spec.adapter in self._histories:
            raise AlreadyExistsError("adapter", f"{spec.adapter} exists")
        _check(spec)
        self._histories[spec.adapter] = (spec,)

    def update(self, spec: AdapterSpec) -> None:
        """Raises NotFoundError, InvalidArgumentError."""
        if spec.adapter not in self._histories:
            raise NotFoundError("adapter", f"{spec.adapter} does not exist")
        _check(spec)
        earlier = [s for s in self._histories[spec.adapter] if s.revision != spec.revision]
        self._histories[spec.adapter] = (spec, *earlier)[:MAX_HISTORY]

    def remove(self, adapter: AdapterId) -> None:
        """Raises NotFoundError."""
        if self._histories.pop(adapter, None) is None:
            raise NotFoundError("adapter", f"{adapter} does not exist")


def _check(spec: AdapterSpec) -> None:
    if spec.size_bytes < 0 or spec.max_rank < 0:
        raise InvalidArgumentError("size_bytes", f"{spec.size_bytes}, rank {spec.max_rank}")
