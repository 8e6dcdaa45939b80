"""The adapters of the cluster: what is durable changes first, then the core is told."""

import asyncio
import logging
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable
from pathlib import Path

from loraserve.checkpoint.durable_store import DurableStore
from loraserve.controller.catalog import MAX_HISTORY
from loraserve.controller.events import AdapterAdded, AdapterRemoved, AdapterUpdated
from loraserve.controller.runtime import Runtime
from loraserve.controller.store import AdapterRecord
from loraserve.controller.whole import whole
from loraserve.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from loraserve.logs import about
from loraserve.placement.types import AdapterId, AdapterSpec

_log = logging.getLogger(__name__)


class AdapterRegistry:
    """One change at a time, so that a blob is never removed while another name takes it up; each
    goes to its end once it has begun, whatever becomes of its caller."""

    def __init__(
        self,
        runtime: Runtime,
        records: Iterable[AdapterRecord],
        blobs: DurableStore,
        clock_us: Callable[[], int],
    ) -> None:
        """`records`: what the runtime's store held when it started. `clock_us`: microseconds since
        1970."""
        self._runtime = runtime
        self._blobs = blobs
        self._clock_us = clock_us
        self._records = {r.adapter: r for r in records}
        # Of each tenant (base, name), sorted; and the bases of each (tenant, name).
        self._names: dict[str, list[tuple[str, str]]] = {}
        self._bases: dict[tuple[str, str], set[str]] = {}
        for tenant, base, name in self._records:
            self._names.setdefault(tenant, []).append((base, name))
            self._bases.setdefault((tenant, name), set()).add(base)
        for names in self._names.values():
            names.sort()
        self._changing = asyncio.Lock()

    def find(self, tenant: str, base: str, name: str) -> AdapterRecord:
        """The tenant's adapter; an empty base where the name alone is clear. Raises NotFoundError,
        InvalidArgumentError."""
        if base:
            found = [r for r in (self._records.get(AdapterId(tenant, base, name)),) if r]
        else:
            bases_of = self._bases.get((tenant, name), set())
            found = [self._records[AdapterId(tenant, b, name)] for b in sorted(bases_of)]
        if not found:
            raise NotFoundError("adapter", f"{name!r} does not exist")
        if len(found) > 1:
            bases = ", ".join(sorted(r.adapter.base for r in found))
            raise InvalidArgumentError("base", f"{name!r} exists for several: {bases}")
        return found[0]

    def page(
        self, tenant: str, base: str, after: tuple[str, str], limit: int
    ) -> list[AdapterRecord]:
        """Up to `limit` adapters of the tenant by (base, name), those after `after`."""
        names = self._names.get(tenant, [])
        begin = bisect_right(names, after)
        if base:
            begin = max(begin, bisect_left(names, (base, "")))
        page = names[begin : begin + limit]
        return [self._records[AdapterId(tenant, b, n)] for b, n in page if not base or b == base]

    def _index(self, adapter: AdapterId) -> None:
        insort(self._names.setdefault(adapter.tenant, []), (adapter.base, adapter.name))
        self._bases.setdefault((adapter.tenant, adapter.name), set()).add(adapter.base)

    def _unindex(self, adapter: AdapterId) -> None:
        names = self._names[adapter.tenant]
        del names[bisect_left(names, (adapter.base, adapter.name))]
        self._bases[adapter.tenant, adapter.name].discard(adapter.base)
        if not self._bases[adapter.tenant, adapter.name]:
            del self._bases[adapter.tenant, adapter.name]

    def check_free(self, adapter: AdapterId) -> None:
        """Raises AlreadyExistsError."""
        if adapter in self._records:
            raise AlreadyExistsError("name", f"the adapter {adapter.name!r} exists: update it")

    async def add(self, spec: AdapterSpec, blob: Path) -> AdapterRecord:
        """A new adapter with the packed bytes in `blob`. Raises AlreadyExistsError, OSError."""
        return await whole(self._add(spec, blob))

    async def _add(self, spec: AdapterSpec, blob: Path) -> AdapterRecord:
        async with self._changing:
            self.check_free(spec.adapter)
            now = self._clock_us()
            record = AdapterRecord((spec,), now, now)
            await self._store(record, blob)
            await self._runtime.apply(AdapterAdded(spec))
        _log.info(
            "adapter %s added, revision %s",
            *(spec.adapter, spec.revision[:12]),
            extra=about(adapter=str(spec.adapter), revision=spec.revision),
        )
        return record

    async def update(
        self, spec: AdapterSpec, blob: Path | None, expected_revision: str | None
    ) -> AdapterRecord:
        """Points the name to `spec`, whose packed bytes are in `blob`, or in the store already.

        Raises NotFoundError, FailedPreconditionError (expected_revision), OSError."""
        return await whole(self._update(spec, blob, expected_revision))

    async def _update(
        self, spec: AdapterSpec, blob: Path | None, expected_revision: str | None
    ) -> AdapterRecord:
        async with self._changing:
            old = self.find(spec.adapter.tenant, spec.adapter.base, spec.adapter.name)
            if expected_revision is not None and old.history[0].revision != expected_revision:
                raise FailedPreconditionError(
                    "expected_revision", f"the name points to {old.history[0].revision}"
                )
            if blob is None and spec not in old.history:
                raise NotFoundError("revision", f"{spec.revision} is not one of the name's")
            earlier = tuple(s for s in old.history if s.revision != spec.revision)
            history = (spec, *earlier)[:MAX_HISTORY]
            # A clock that was set back must not make an update older than what it updates.
            now = max(self._clock_us(), old.update_time_us)
            record = AdapterRecord(history, old.create_time_us, now)
            await self._store(record, blob)
            if old.history[0].revision != spec.revision:
                await self._runtime.apply(AdapterUpdated(spec))
            await self._collect([s for s in old.history if s not in history])
        _log.info(
            "adapter %s updated, revision %s",
            *(spec.adapter, spec.revision[:12]),
            extra=about(adapter=str(spec.adapter), revision=spec.revision),
        )
        return record

    async def remove(self, adapter: AdapterId) -> None:
        """Raises NotFoundError, OSError."""
        await whole(self._remove(adapter))

    async def _remove(self, adapter: AdapterId) -> None:
        async with self._changing:
            record = self.find(adapter.tenant, adapter.base, adapter.name)
            await asyncio.to_thread(self._runtime.store.remove_adapter, adapter)
            del self._records[adapter]
            self._unindex(adapter)
            await self._runtime.apply(AdapterRemoved(adapter))
            await self._collect(list(record.history))
        _log.info("adapter %s removed", adapter, extra=about(adapter=str(adapter)))

    async def _store(self, record: AdapterRecord, blob: Path | None) -> None:
        revision = record.history[0].revision
        if blob is not None:
            await asyncio.to_thread(self._blobs.put, revision, blob)
        await asyncio.to_thread(self._runtime.store.put_adapter, record)
        if record.adapter not in self._records:
            self._index(record.adapter)
        self._records[record.adapter] = record

    async def _collect(self, specs: list[AdapterSpec]) -> None:
        """Removes blobs that no name has any more. A blob left over costs only its room."""
        for spec in specs:
            try:
                in_use = await asyncio.to_thread(self._runtime.store.revision_in_use, spec.revision)
                if not in_use:
                    await asyncio.to_thread(self._blobs.remove, spec.revision)
            except OSError as error:
                _log.warning("blob %s could not be removed: %s", spec.revision[:12], error)
