"""A mapping by adapter that is never changed: changes make a new one that shares most of the old.

A route table of 100,000 adapters changes by the second while watchers, metrics and the simulator
still read older versions of it. Copying it each time would cost milliseconds, a shard costs one.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from loraserve.placement.types import AdapterId

V = TypeVar("V")

SHARDS = 4096


def _shard(adapter: AdapterId) -> int:
    return hash(adapter.name) % SHARDS


class AdapterMap(Mapping[AdapterId, V]):
    """In no order that means anything; it is another one in every process."""

    __slots__ = ("_count", "_shards")

    def __init__(self) -> None:
        self._shards: tuple[dict[AdapterId, V], ...] = ({},) * SHARDS
        self._count = 0

    def __getitem__(self, adapter: AdapterId) -> V:
        return self._shards[_shard(adapter)][adapter]

    def find(self, adapter: AdapterId) -> V | None:
        """As `get`, which is slow."""
        return self._shards[_shard(adapter)].get(adapter)

    def __contains__(self, adapter: object) -> bool:
        return isinstance(adapter, AdapterId) and adapter in self._shards[_shard(adapter)]

    def __iter__(self) -> Iterator[AdapterId]:
        for shard in self._shards:
            yield from shard

    def __len__(self) -> int:
        return self._count

    def changed(
        self, entries: Mapping[AdapterId, V], removed: Iterable[AdapterId] = ()
    ) -> "AdapterMap[V]":
        """A copy with `entries` put in and `removed` taken out."""
        shards = list(self._shards)
        own: set[int] = set()
        count = self._count
        for adapter in removed:
            at = _own(shards, own, adapter)
            count -= shards[at].pop(adapter, None) is not None
        for adapter, value in entries.items():
            at = _own(shards, own, adapter)
            count += adapter not in shards[at]
            shards[at][adapter] = value
        made: AdapterMap[V] = AdapterMap()
        made._shards, made._count = tuple(shards), count
        return made


def _own(shards: list[dict[AdapterId, V]], own: set[int], adapter: AdapterId) -> int:
    """The adapter's shard, copied before its first change."""
    at = _shard(adapter)
    if at not in own:
        own.add(at)
        shards[at] = dict(shards[at])
    return at
