"""The adapters that a node holds: loaded on command or on demand, dropped when nobody uses them.

Lives on the event loop; fetching and installing happen in threads, so requests for other adapters
go on. A request whose adapter is on its way waits in that adapter's own queue.
"""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from loraserve.background import background_threads
from loraserve.checkpoint.packed_adapter import PackedAdapter
from loraserve.errors import DeadlineExceededError, LoraServeError, UnavailableError
from loraserve.node.engine_api import ServedEngine
from loraserve.node.held import DRAINING, FAILED, FETCHING, HOST, HeldAdapter, refusal
from loraserve.node.held_table import HeldTable
from loraserve.node.limits import Limits, full
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.pool.copies import HostCopies
from loraserve.node.requests import LiveRequest
from loraserve.node.resolving import Resolver, Resolving
from loraserve.node.room import HostRoom, usable_bytes
from loraserve.placement.types import AdapterId, AdapterSpec

_log = logging.getLogger(__name__)

_CONCURRENT_LOADS = 4
# Requests have ended before the engine is asked to unload; it needs a step or two.
_UNLOAD_S = 10.0


class HeldAdapters(HeldTable):
    """The table of what is held, and how that changes. `on_load` is called with the seconds of
    every load that succeeded, `on_evict` for every copy that makes room for another, `on_lookup`
    with whether a request found its adapter."""

    def __init__(
        self,
        engine: ServedEngine,
        host: HostCopies,
        limits: Limits,
        *,
        resolve: Resolver | None = None,
        on_change: Callable[[], None] = lambda: None,
        on_load: Callable[[float], None] = lambda seconds: None,
        on_evict: Callable[[], None] = lambda: None,
        on_lookup: Callable[[bool], None] = lambda hit: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(engine.installed, on_change)
        self._engine = engine
        self.host = host
        self._room = HostRoom(host, lambda held: host.fetch.cost_s(held.load))
        self._limits = limits
        self._resolving = Resolving(resolve)
        self._on_load = on_load
        self._on_evict = on_evict
        self._on_lookup = on_lookup
        self._clock = clock
        self._waiting: Counter[AdapterId] = Counter()
        self._serials = itertools.count(1)
        self._slots = asyncio.Semaphore(_CONCURRENT_LOADS)
        self._threads = background_threads(_CONCURRENT_LOADS, "adapter-load")
        self._cleanups: set[asyncio.Task[None]] = set()

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
        self._on_lookup(True)
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
        self._on_lookup(False)
        self._waiting[adapter] += 1
        try:
            held = self._coming(adapter, revision)
            if held is None:
                load = await self._resolving.resolved(adapter, revision)
                held = self.begin_load(load, placed=False)
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
        """Whether a copy (None: of any revision) serves here or is on its way."""
        if self._resolving.asks(adapter, revision):
            return True
        copies = self._held.get(adapter, {}).values()
        return any(
            h.state in (HOST, FETCHING) and revision in (None, h.spec.revision) for h in copies
        )

    def release(self, held: HeldAdapter, user: LiveRequest) -> None:
        held.unpin(user)
        self._room.used(held)

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
        if self._resolving.can_ask:  # the name may point elsewhere by now
            return None
        return self.begin_load(held.load, placed=held.placed)

    # Loading

    @property
    def memory_bytes(self) -> int:
        """Of packed adapters that placement may count on here."""
        return usable_bytes(self.host.pool.capacity_bytes)

    def begin_load(self, load: AdapterLoadInfo, *, placed: bool) -> HeldAdapter:
        """Starts to load a revision, or joins the load that runs; `settled` tells its end.

        Raises ResourceExhaustedError where the host pool has no room.
        """
        spec = load.spec
        copies = self._held.get(spec.adapter, {})
        known = copies.get(spec.revision)
        if known is not None:
            if known.state == DRAINING and not known.unloading and known.dropping is not None:
                known.dropping.cancel()
                known.dropping = None
                known.state = HOST
                self._room.used(known)
                self._changed(known)
            known.placed = known.placed or placed
            if known.state in (HOST, FETCHING):
                return known
        if spec.size_bytes:  # otherwise its header will tell
            self._evict_for(spec, promised=True)
        held = HeldAdapter(load, next(self._serials), placed, known.failures if known else 0)
        if known is not None:
            held.placed = placed or known.placed
        self._held.setdefault(spec.adapter, {})[spec.revision] = held
        held.loading = asyncio.create_task(self._load(held))
        # Also where it is cancelled before it could do anything.
        held.loading.add_done_callback(lambda _: held.settled.set())
        self._changed(held)
        return held

    async def hold(self, adapter: AdapterId, packed: PackedAdapter) -> None:
        """Holds a packed adapter that somebody else has read. Raises what the engine raises, and
        ResourceExhaustedError."""
        spec = AdapterSpec(adapter, packed.revision, packed.size_bytes, packed.max_rank)
        held = HeldAdapter(AdapterLoadInfo(spec), next(self._serials), placed=True)
        copy = await self.host.put(packed, lambda size: self._make_room(spec))
        try:
            await self._in_thread(lambda: self._engine.load_adapter(held.engine_name, copy.packed))
        except BaseException:
            self.host.give_back(copy)
            raise
        held.copy = copy
        held.state = HOST
        held.settled.set()
        self._held.setdefault(adapter, {})[spec.revision] = held
        self._changed(held)

    def _evict_for(self, spec: AdapterSpec, promised: bool) -> None:
        """Begins to drop what is in the way of `spec`. Raises ResourceExhaustedError."""
        for held in self._room.copies_to_evict(self._all(), spec, promised):
            _log.info(
                "evicting %s revision %s",
                *(held.spec.adapter, held.spec.revision[:12]),
                extra=held.about,
            )
            self._on_evict()
            self.begin_drop(held)

    def _make_room(self, spec: AdapterSpec) -> "set[asyncio.Future[None]]":
        """As MakeRoom of the host pool: now, when the adapter's turn has come."""
        self._evict_for(spec, promised=False)
        return {h.dropping for h in self._all() if h.leaving and h.dropping is not None}

    async def _load(self, held: HeldAdapter) -> None:
        start = self._clock()
        try:
            async with self._slots:
                copy = await self.host.obtain(
                    held.load,
                    lambda size: self._make_room(replace(held.spec, size_bytes=size)),
                )
                held.copy, held.installing = copy, True
                packed = copy.packed
                if not held.spec.size_bytes:
                    spec = replace(
                        held.spec, size_bytes=packed.size_bytes, max_rank=packed.max_rank
                    )
                    held.load = replace(held.load, spec=spec)
                # Whether it may serve this base was decided when it was admitted to the cluster.
                await self._in_thread(
                    lambda: self._engine.load_adapter(
                        held.engine_name, packed, allow_base_mismatch=True
                    )
                )
        except Exception as error:
            self._give_back(held)
            typed = error if isinstance(error, LoraServeError) else None
            if typed is None:
                _log.exception("loading %s failed", held.spec.adapter)
                typed = LoraServeError("adapter", "loading failed; the node's log says why")
            _log.warning(
                "adapter %s revision %s: %s",
                *(held.spec.adapter, held.spec.revision[:12], typed),
                extra=held.about,
            )
            held.fail(typed, self._clock())
            self._changed(held)
            return
        if held.dropping is not None:  # it was dropped while the engine was reading it
            return
        seconds = self._clock() - start
        held.state = HOST
        self._room.used(held)
        held.settled.set()
        self._changed(held)
        self._on_load(seconds)
        spec = held.spec
        _log.info(
            "adapter %s revision %s is here: rank %d, %d bytes, %.3f s",
            *(spec.adapter, spec.revision[:12], spec.max_rank, spec.size_bytes, seconds),
            extra=held.about,
        )

    def _give_back(self, held: HeldAdapter) -> None:
        copy, held.copy = held.copy, None
        if copy is not None:
            self.host.give_back(copy)

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
        await self._unload(held)
        self._give_back(held)
        self._forget(held)
        _log.info(
            "adapter %s revision %s is gone",
            *(held.spec.adapter, held.spec.revision[:12]),
            extra=held.about,
        )

    async def _unload(self, held: HeldAdapter) -> None:
        """Returns when the engine reads the copy no more."""
        while True:
            try:
                await self._in_thread(
                    lambda: self._engine.unload_adapter(held.engine_name, _UNLOAD_S)
                )
            except DeadlineExceededError as error:
                _log.warning("unloading %s: %s", held.spec.adapter, error)
                continue
            except LoraServeError as error:  # it does not have it, or has ended
                _log.error("unloading %s: %s", held.spec.adapter, error)
            return

    async def close(self) -> None:
        """Ends loads and drops; the engine keeps what it has."""
        await self._resolving.close()
        tasks = [*self._cleanups]
        tasks += [h.loading for h in self._all() if h.loading is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.host.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
