"""The requests that a node has taken and not yet ended. Lives on the event loop."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from loraserve.errors import AlreadyExistsError, CancelledError, LoraServeError
from loraserve.node.limits import Limits, full

# A request that was ended waits so long for its client to read what was written before.
STALLED_S = 5.0


class LiveRequest:
    """One attempt of one request. `abort` is set once the engine has it; `task` is the one that
    writes the answer."""

    def __init__(self, tenant: str, request_id: str, attempt: int) -> None:
        self.tenant = tenant
        self.request_id = request_id
        self.attempt = attempt
        self.queued_prefill_tokens = 0
        self.adapter = ""
        """Its name; empty for the base model."""
        self.answering = False
        """Whether its first token is there."""
        self.rank = 0
        self.abort: Callable[[], None] | None = None
        self.task: asyncio.Task[None] | None = None
        self.cut_off = False
        self._timers: list[asyncio.TimerHandle] = []
        self.ended_by: LoraServeError | None = None
        # Done when somebody ends the request from outside before the engine has it.
        self.stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def engine_request_id(self) -> str:
        return f"{self.tenant}/{self.request_id}#{self.attempt}"

    def end(self, error: LoraServeError | None) -> None:
        """Ends the request: with `error`, or with what it has so far where there is none."""
        self.ended_by = self.ended_by or error
        if not self.stopped.done():
            self.stopped.set_result(None)
        if self.abort is not None:
            self.abort()
        self._timers.append(asyncio.get_running_loop().call_later(STALLED_S, self._cut_off))

    def end_after(self, seconds: float, error: LoraServeError) -> None:
        """Ends the request with `error` unless it is gone by then."""
        self._timers.append(asyncio.get_running_loop().call_later(seconds, self.end, error))

    def answered(self) -> None:
        """The engine has brought something of the answer."""
        self.queued_prefill_tokens = 0
        self.answering = True

    @contextlib.contextmanager
    def cut_off_after(self, seconds: float, error: LoraServeError) -> Iterator[None]:
        """Cuts the task off, to end with `error`, unless the block ends before."""

        def cut_off() -> None:
            self.ended_by = self.ended_by or error
            self._cut_off()

        timer = asyncio.get_running_loop().call_later(seconds, cut_off)
        try:
            yield
        finally:
            timer.cancel()

    def _cut_off(self) -> None:
        """The client does not read: what the request holds must not wait for that."""
        if self.task is not None and not self.cut_off:
            self.cut_off = True
            self.task.cancel()

    def gone(self) -> None:
        """Nothing is to be ended any more."""
        for timer in self._timers:
            timer.cancel()


class LiveRequests:
    """Bounded, in all and for each tenant; request ids are unique within a tenant."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._of_tenant: Counter[str] = Counter()
        self._live: dict[tuple[str, str], LiveRequest] = {}
        # Attempts that a later one has replaced and that have not ended yet.
        self._replaced: set[LiveRequest] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._live) + len(self._replaced)

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens of requests that the engine has and that have brought no token yet."""
        return sum(request.queued_prefill_tokens for request in self._live.values())

    def by_adapter(self) -> tuple[Counter[str], Counter[str]]:
        """How many have their first token and how many wait for it, by adapter. For any thread."""
        running: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for request in list(self._live.values()):
            (running if request.answering else waiting)[request.adapter] += 1
        return running, waiting

    def ranks(self) -> tuple[int, int]:
        """Of the adapters of all requests: the sum, and the largest."""
        ranks = [request.rank for request in (*self._live.values(), *self._replaced)]
        return sum(ranks), max(ranks, default=0)

    def add(self, tenant: str, request_id: str, attempt: int) -> LiveRequest:
        """Takes a request; a higher attempt ends the one that runs, whose client is gone.

        Raises AlreadyExistsError for any other attempt, ResourceExhaustedError where the node is
        full, or has as many of the tenant as one may have.
        """
        key = (tenant, request_id)
        known = self._live.get(key)
        if known is not None and attempt <= known.attempt:
            raise AlreadyExistsError(
                "request_id", f"{request_id!r} runs here in attempt {known.attempt}"
            )
        # The one that is replaced makes room for the new one as soon as it has ended.
        leaving = known is not None
        if len(self) - leaving >= self._limits.max_requests:
            raise full("requests", len(self))
        of_tenant = self._of_tenant[tenant]
        if of_tenant - leaving >= self._limits.max_requests_of_a_tenant:
            raise full("requests", of_tenant, f" of tenant {tenant!r}")
        if known is not None:
            self._replaced.add(known)
            known.end(CancelledError("attempt", f"attempt {attempt} has replaced it"))
        self._live[key] = made = LiveRequest(tenant, request_id, attempt)
        self._of_tenant[tenant] += 1
        self._empty.clear()
        return made

    def remove(self, request: LiveRequest) -> None:
        request.gone()
        key = (request.tenant, request.request_id)
        if self._live.get(key) is request:
            del self._live[key]
        self._replaced.discard(request)
        self._of_tenant[request.tenant] -= 1
        if not self._of_tenant[request.tenant]:
            del self._of_tenant[request.tenant]
        if not len(self):
            self._empty.set()

    def abort(self, tenant: str | None, request_id: str) -> bool:
        """Ends the request of `tenant` (None: of any). Whether there was one."""
        found = [
            request
            for (owner, known), request in self._live.items()
            if known == request_id and tenant in (None, owner)
        ]
        for request in found:
            request.end(None)
        return bool(found)

    async def wait_empty(self, timeout_s: float) -> bool:
        """Whether every request has ended within the time."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def end_all(self, error: LoraServeError) -> int:
        """Ends every request with `error`; how many those are."""
        ended = [*self._live.values(), *self._replaced]
        for request in ended:
            request.end(error)
        return len(ended)
