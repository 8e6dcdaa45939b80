"""The adapters that a node holds: loaded on command or on demand, dropped when nobody uses them.

Lives on the event loop; fetching and installing happen in threads, so requests for other adapters
go on. A request whose adapter is on its way waits in that adapter's own queue.
"""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from loraserve.errors import LoraServeError, NotFoundError, UnavailableError
from loraserve.node.engine_api import ServedEngine
from loraserve.node.held import DEVICE, DRAINING, FAILED, FETCHING, HOST, HeldAdapter, refusal
from loraserve.node.limits import Limits, full
from loraserve.node.requests import LiveRequest
from loraserve.node.residency import ChangeJournal, CopyKey
from loraserve.node.room import copies_to_evict
from loraserve.node.sources import AdapterFetch, Packed
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.v1 import common_pb2

_log = logging.getLogger(__name__)

_CONCURRENT_LOADS = 4
# Requests have ended before the engine is asked to unload; it needs a step or two.
_UNLOAD_S = 10.0

# Which revision a name points to (None), or whether a name has the revision. Raises NotFoundError
# or UnavailableError.
Resolver = Callable[[AdapterId, str | None], Awaitable[AdapterSpec]]


class HeldAdapters:
    """`on_change` is called whenever `generation` has risen, `on_load` with the seconds of every
    load that succeeded."""

    def __init__(
        self,
        engine: ServedEngine,
        fetch: AdapterFetch,
        limits: Limits,
        *,
        resolve: Resolver | None = None,
        on_change: Callable[[], None] = lambda: None,
        on_load: Callable[[float], None] = lambda seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._fetch = fetch
        self._limits = limits
        self._resolve = resolve
        self._on_change = on_change
        self._on_load = on_load
        self._clock = clock
        self._held: dict[AdapterId, dict[str, HeldAdapter]] = {}
        self._waiting: Counter[AdapterId] = Counter()
        self._resolving: dict[tuple[AdapterId, str | None], asyncio.Task[AdapterSpec]] = {}
        self._serials = itertools.count(1)
        self._slots = asyncio.Semaphore(_CONCURRENT_LOADS)
        self._threads = ThreadPoolExecutor(_CONCURRENT_LOADS, "adapter-load")
        self._cleanups: set[asyncio.Task[None]] = set()
        self._journal: ChangeJournal[CopyKey] = ChangeJournal()
        self._installed: frozenset[str] = frozenset()

    # What is here

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
        installed = self._engine.installed()
        moved = installed ^ self._installed
        self._installed = installed
        if moved:
            for held in self._all():
                if held.engine_name in moved:
                    self._journal.changed((held.spec.adapter, held.spec.revision))

    def count_by_state(self) -> Counter[int]:
        """Copies by ResidencyState. The only method that other threads may call."""
        installed = self._engine.installed()
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

    # Use by requests

    def acquire_now(
        self, adapter: AdapterId, revision: str | None, user: LiveRequest
    ) -> HeldAdapter | None:
        """The copy that serves now, pinned for `user`; None where the request must wait. Without
        a revision, the one that came last."""
        copies = self._held.get(adapter)
        if copies is None:
            return None
        held: HeldAdapter | None
        if revision is not None:
            held = copies.get(revision)
        else:
            serving = (h for h in copies.values() if h.state == HOST)
            held = max(serving, key=lambda h: h.serial, default=None)
        if held is None or held.state != HOST:
            return None
        held.pin(user)
        return held

    async def acquire(
        self, adapter: AdapterId, revision: str | None, user: LiveRequest
    ) -> HeldAdapter:
        """As `acquire_now`, but loads what is not here and waits for it. Release what it returns.

        Raises NotFoundError, UnavailableError, FailedPreconditionError (cannot be loaded) and
        ResourceExhaustedError (queue of this adapter, or memory of the node, is full).
        """
        if self._waiting[adapter] >= self._limits.max_waiting_per_adapter:
            raise full("adapter", self._waiting[adapter])
        self._waiting[adapter] += 1
        try:
            held = self._coming(adapter, revision)
            if held is None:
                held = self.begin_load(await self._resolved(adapter, revision), placed=False)
            held.pin(user)
            try:
                await held.settled.wait()
                if held.error is not None:
                    raise refusal(held.error)
                if held.state != HOST:
                    raise UnavailableError("adapter", "is being dropped from this node")
            except BaseException:
                self.release(held, user)
                raise
            return held
        finally:
            self._waiting[adapter] -= 1
            if not self._waiting[adapter]:
                del self._waiting[adapter]

    def has_or_awaits(self, adapter: AdapterId, revision: str | None) -> bool:
        """Whether a copy (None: of any revision) serves here or is on its way. A name that is being
        resolved most likely means the revision that is asked for."""
        if (adapter, revision) in self._resolving or (adapter, None) in self._resolving:
            return True
        copies = self._held.get(adapter, {}).values()
        return any(
            h.state in (HOST, FETCHING) and revision in (None, h.spec.revision) for h in copies
        )

    def release(self, held: HeldAdapter, user: LiveRequest) -> None:
        held.unpin(user, self._clock())

    def _coming(self, adapter: AdapterId, revision: str | None) -> HeldAdapter | None:
        """The copy that a request is to wait for; None where the node must ask for one."""
        copies = self._held.get(adapter, {})
        if revision is not None:
            held = copies.get(revision)
        else:
            able = (h for h in copies.values() if h.state != DRAINING)
            # An older one that comes is worth more than a newer one that failed.
            held = max(able, key=lambda h: (h.state != FAILED, h.serial), default=None)
        if held is None or held.state in (HOST, FETCHING):
            return held
        if held.state == DRAINING:
            raise UnavailableError("adapter", "is being dropped from this node")
        if held.error is not None and self._clock() < held.retry_s:
            raise refusal(held.error)
        if self._resolve is not None:  # the name may point elsewhere by now
            return None
        return self.begin_load(held.spec, placed=held.placed)

    async def _resolved(self, adapter: AdapterId, revision: str | None) -> AdapterSpec:
        if self._resolve is None:
            raise NotFoundError("adapter", f"{adapter.name!r} is not on this node")
        key = (adapter, revision)
        asking = self._resolving.get(key)
        if asking is None:
            asking = asyncio.ensure_future(self._resolve(adapter, revision))
            self._resolving[key] = asking
            asking.add_done_callback(lambda task: self._answered(key, task))
        return await asyncio.shield(asking)

    def _answered(
        self, key: tuple[AdapterId, str | None], task: "asyncio.Task[AdapterSpec]"
    ) -> None:
        del self._resolving[key]
        if not task.cancelled():
            task.exception()  # those who wait have it; without them it is nobody's

    # Loading

    def begin_load(self, spec: AdapterSpec, *, placed: bool) -> HeldAdapter:
        """Starts to load a revision, or joins the load that runs; `settled` tells its end.

        Raises ResourceExhaustedError where the adapter memory has no room.
        """
        copies = self._held.get(spec.adapter, {})
        known = copies.get(spec.revision)
        if known is not None:
            if known.state == DRAINING and not known.unloading and known.dropping is not None:
                if not known.users:  # it may have been evicted for another
                    self._make_room(known.spec, placed)
                known.dropping.cancel()
                known.dropping = None
                known.state = HOST
                self._changed(known)
            known.placed = known.placed or placed
            if known.state in (HOST, FETCHING):
                return known
        self._make_room(spec, placed)
        held = HeldAdapter(spec, next(self._serials), placed, known.failures if known else 0)
        if known is not None:
            held.placed = placed or known.placed
        self._held.setdefault(spec.adapter, {})[spec.revision] = held
        held.loading = asyncio.create_task(self._load(held))
        # Also where it is cancelled before it could do anything.
        held.loading.add_done_callback(lambda _: held.settled.set())
        self._changed(held)
        return held

    async def hold(self, adapter: AdapterId, packed: Packed) -> None:
        """Holds a packed adapter that somebody else has read. Raises what the engine raises."""
        spec = AdapterSpec(adapter, packed.revision, packed.size_bytes, packed.max_rank)
        self._make_room(spec, placed=True)
        held = HeldAdapter(spec, next(self._serials), placed=True)
        await self._in_thread(lambda: self._engine.load_adapter(held.engine_name, packed))
        held.state = HOST
        held.settled.set()
        self._held.setdefault(adapter, {})[spec.revision] = held
        self._changed(held)

    def _make_room(self, spec: AdapterSpec, placed: bool) -> None:
        """Evicts what is in the way of `spec`. Raises ResourceExhaustedError."""
        limit_bytes = self._limits.adapter_memory_bytes
        for held in copies_to_evict(self._all(), spec, placed, limit_bytes):
            _log.info("evicting %s revision %s", held.spec.adapter, held.spec.revision[:12])
            self.begin_drop(held)

    async def _load(self, held: HeldAdapter) -> None:
        spec, start = held.spec, self._clock()
        try:
            async with self._slots:
                packed = await self._fetch.fetch(spec)
                if not spec.size_bytes:
                    held.spec = replace(
                        spec, size_bytes=packed.size_bytes, max_rank=packed.max_rank
                    )
                    self._make_room(held.spec, held.placed)
                held.installing = True
                # Whether it may serve this base was decided when it was admitted to the cluster.
                await self._in_thread(
                    lambda: self._engine.load_adapter(
                        held.engine_name, packed, allow_base_mismatch=True
                    )
                )
        except Exception as error:
            typed = error if isinstance(error, LoraServeError) else None
            if typed is None:
                _log.exception("loading %s failed", spec.adapter)
                typed = LoraServeError("adapter", "loading failed; the node's log says why")
            _log.warning("adapter %s revision %s: %s", spec.adapter, spec.revision[:12], typed)
            held.fail(typed, self._clock())
            self._changed(held)
            return
        if held.dropping is not None:  # it was dropped while the engine was reading it
            return
        seconds = self._clock() - start
        held.state, held.used_s = HOST, self._clock()
        held.settled.set()
        self._changed(held)
        self._on_load(seconds)
        _log.info(
            "adapter %s revision %s is here: rank %d, %d bytes, %.3f s",
            *(spec.adapter, spec.revision[:12], held.spec.max_rank, held.spec.size_bytes, seconds),
        )

    def _in_thread(self, call: Callable[[], object]) -> "asyncio.Future[object]":
        return asyncio.get_running_loop().run_in_executor(self._threads, call)

    # Dropping

    def begin_drop(self, held: HeldAdapter, timeout_s: float | None = None) -> None:
        """Serves nobody new; the copy goes when its users have ended, and after `timeout_s` they
        are ended. `dropping` of the copy ends when it is gone, unless it is wanted again."""
        if held.dropping is not None:
            if timeout_s is not None:
                asyncio.get_running_loop().call_later(
                    timeout_s, self._end_users, held, held.dropping
                )
            return
        held.placed = False
        if held.state == HOST:
            held.state = DRAINING
            self._changed(held)
        else:
            held.error = held.error or UnavailableError("adapter", "was dropped while it loaded")
            self._forget(held)
            if held.loading is not None and not held.installing:
                held.loading.cancel()
        held.dropping = asyncio.create_task(self._drop(held, timeout_s))
        self._cleanups.add(held.dropping)
        held.dropping.add_done_callback(self._cleanups.discard)

    def _end_users(self, held: HeldAdapter, dropping: "asyncio.Task[None] | None") -> None:
        if held.dropping is not dropping:  # wanted again since
            return
        for user in list(held.users):
            user.end(UnavailableError("adapter", "was unloaded"))

    async def _drop(self, held: HeldAdapter, timeout_s: float | None) -> None:
        if held.loading is not None:
            await asyncio.wait({held.loading})
        if held.state == FAILED or (held.state == FETCHING and not held.installing):
            return
        try:
            await asyncio.wait_for(held.idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            self._end_users(held, asyncio.current_task())
            await held.idle.wait()
        if held.dropping is not asyncio.current_task():  # wanted again in this very moment
            return
        held.unloading = True
        try:
            await self._in_thread(lambda: self._engine.unload_adapter(held.engine_name, _UNLOAD_S))
        except LoraServeError as error:
            _log.error("unloading %s: %s", held.spec.adapter, error)
        self._forget(held)
        _log.info("adapter %s revision %s is gone", held.spec.adapter, held.spec.revision[:12])

    async def close(self) -> None:
        """Ends loads and drops; the engine keeps what it has."""
        tasks = [*self._cleanups, *self._resolving.values()]
        tasks += [h.loading for h in self._all() if h.loading is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
