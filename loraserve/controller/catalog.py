"""The adapters of the cluster, as the core knows them: names and their revisions."""

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from loraserve.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from loraserve.placement.arrays import Ints
from loraserve.placement.types import AdapterId, AdapterSpec

# Revisions of a name that can be served or returned to.
MAX_HISTORY = 8


class Rows:
    """Current revisions in the order of their adapters, as placement wants them: adapters by row,
    and the columns that only change with the catalog. Made when they are first read, which is where
    placement is computed."""

    def __init__(self, specs: Iterable[AdapterSpec]) -> None:
        self._specs = tuple(specs)

    @cached_property
    def specs(self) -> list[AdapterSpec]:
        return sorted(self._specs, key=lambda s: s.adapter)

    @cached_property
    def adapters(self) -> list[AdapterId]:
        return [spec.adapter for spec in self.specs]

    @cached_property
    def row(self) -> dict[AdapterId, int]:
        return {adapter: i for i, adapter in enumerate(self.adapters)}

    @cached_property
    def size_bytes(self) -> Ints:
        return np.array([s.size_bytes for s in self.specs], np.int64)

    @cached_property
    def rank(self) -> Ints:
        return np.array([s.max_rank for s in self.specs], np.int64)

    @cached_property
    def bases(self) -> list[str]:
        return sorted({a.base for a in self.adapters})

    @cached_property
    def base(self) -> Ints:
        """The number in `bases` of each adapter's."""
        number = {base: i for i, base in enumerate(self.bases)}
        return np.array([number[a.base] for a in self.adapters], np.int64)


class Catalog:
    """Of each adapter its revisions, newest first; the first is what the name points to."""

    def __init__(self, histories: Iterable[tuple[AdapterSpec, ...]]) -> None:
        self._histories: dict[AdapterId, tuple[AdapterSpec, ...]] = {}
        self._rows: Rows | None = None
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

    def specs(self) -> Iterator[AdapterSpec]:
        """What every name points to, in no order."""
        return (history[0] for history in self._histories.values())

    def history(self, adapter: AdapterId) -> tuple[AdapterSpec, ...]:
        """Empty where the adapter is unknown."""
        return self._histories.get(adapter, ())

    def current(self, adapter: AdapterId) -> AdapterSpec | None:
        history = self._histories.get(adapter)
        return history[0] if history else None

    def revision(self, adapter: AdapterId, revision: str) -> AdapterSpec | None:
        for spec in self._histories.get(adapter, ()):
            if spec.revision == revision:
                return spec
        return None

    def rows(self) -> "Rows":
        """What every name points to; the same object until that changes."""
        if self._rows is None:
            self._rows = Rows(self.specs())
        return self._rows

    def add(self, spec: AdapterSpec) -> None:
        """Raises AlreadyExistsError, InvalidArgumentError."""
        if spec.adapter in self._histories:
            raise AlreadyExistsError("adapter", f"{spec.adapter} exists")
        _check(spec)
        self._histories[spec.adapter] = (spec,)
        self._rows = None

    def update(self, spec: AdapterSpec) -> None:
        """Raises NotFoundError, InvalidArgumentError."""
        if spec.adapter not in self._histories:
            raise NotFoundError("adapter", f"{spec.adapter} does not exist")
        _check(spec)
        earlier = [s for s in self._histories[spec.adapter] if s.revision != spec.revision]
        self._histories[spec.adapter] = (spec, *earlier)[:MAX_HISTORY]
        self._rows = None

    def remove(self, adapter: AdapterId) -> None:
        """Raises NotFoundError."""
        if self._histories.pop(adapter, None) is None:
            raise NotFoundError("adapter", f"{adapter} does not exist")
        self._rows = None


def _check(spec: AdapterSpec) -> None:
    if spec.size_bytes < 0 or spec.max_rank < 0:
        raise InvalidArgumentError("size_bytes", f"{spec.size_bytes}, rank {spec.max_rank}")
