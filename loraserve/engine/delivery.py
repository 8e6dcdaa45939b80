"""Carries the engine's outputs to threads and event loops: one wake-up for each step and loop."""

import asyncio
import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from loraserve import _engine
from loraserve.engine.assembly import RawOutput, typed_error
from loraserve.errors import LoraServeError, UnavailableError

# How long the delivering thread sleeps at most before it looks whether it should end.
_POLL_S = 0.5


class Mailbox:
    """Outputs of one request, taken by a waiting thread or by a coroutine of `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self._items: deque[RawOutput] = deque()
        self._condition = threading.Condition()
        self._event = asyncio.Event() if loop else None

    def put(self, item: RawOutput) -> None:
        """From the delivering thread if there is no loop, else on the loop."""
        if self._event is not None:
            self._items.append(item)
            self._event.set()
            return
        with self._condition:
            self._items.append(item)
            self._condition.notify()

    def get(self, timeout_s: float | None) -> RawOutput | None:
        """The next output, or None if none came in time."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._items, timeout_s):
                return None
            return self._items.popleft()

    async def aget(self) -> RawOutput:
        """What has come since the last call, as one output. A loop that cannot keep up with the
        engine's steps so gets fewer and longer outputs instead of falling further behind."""
        assert self._event is not None
        while not self._items:
            self._event.clear()
            await self._event.wait()
        items = self._items
        output = items.popleft()
        while items and output.error is None and items[0].error is None:
            output = output.joined(items.popleft())
        return output


@dataclass(slots=True)
class StepOutputs:
    """What came for the requests of one sink. `others` come before `tokens`; a key may be in
    `keys` more than once, where the steps came faster than they were taken."""

    keys: list[Any] = field(default_factory=list)
    """Of requests that got one further token and nothing else."""
    tokens: list[int] = field(default_factory=list)
    """As many."""
    others: list[tuple[Any, RawOutput]] = field(default_factory=list)


class StepSink(Protocol):
    """Takes the outputs of many requests, all of a step at once."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    def take(self, step: StepOutputs) -> None:
        """On the loop."""


Receiver = Mailbox | tuple[StepSink, Any]
"""A sink comes with the key of the request."""


def _raw(output: _engine.Output) -> RawOutput:
    reason = output.finish_reason
    return RawOutput(
        first_index=output.first_index,
        token_ids=output.token_ids,
        logprobs=output.logprobs,
        top_logprobs=[dict(top) for top in output.top_logprobs],
        prompt_logprobs=output.prompt_logprobs,
        prompt_top_logprobs=[dict(top) for top in output.prompt_top_logprobs],
        cached_tokens=output.cached_tokens,
        queue_s=output.queue_seconds,
        finish_reason=reason,
        error=typed_error(output.error_code, output.error_message) if reason == "error" else None,
    )


def _plain(index: int, token: int) -> RawOutput:
    return RawOutput(index, [token], [], [], [], [], 0, 0.0, "", None)


def _failed(error: LoraServeError) -> RawOutput:
    return RawOutput(0, [], [], [], [], [], 0, 0.0, "error", error)


def _put_all(items: list[tuple[Mailbox, RawOutput]]) -> None:
    for mailbox, item in items:
        mailbox.put(item)


class Delivery:
    """The thread that waits for the engine's reports.

    `on_removed` is called with adapter ids, `on_installs` with (adapter id, whether it is in pages
    now) in the order in which that changed.
    """

    def __init__(
        self,
        engine: _engine.Engine,
        on_removed: Callable[[list[int]], None],
        on_installs: Callable[[list[tuple[int, bool]]], None],
    ) -> None:
        self._engine = engine
        self._on_removed = on_removed
        self._on_installs = on_installs
        self._records: list[_engine.StepRecord] = []
        self._lock = threading.Lock()
        self._receivers: dict[int, Receiver] = {}
        self._closed = False
        # A daemon, so that a program ends whose engine still runs; `_stop_all` ends it before the
        # interpreter goes away under it.
        self._thread = threading.Thread(target=self._run, name="engine-delivery", daemon=True)
        with _started_lock:
            _started.add(self)
        self._thread.start()

    def register(self, request_id: int, receiver: Receiver) -> None:
        """Before the request is submitted."""
        with self._lock:
            if self._closed:
                raise UnavailableError("engine", "is closed")
            self._receivers[request_id] = receiver

    def forget(self, request_id: int) -> None:
        """Nothing more is delivered for this request."""
        with self._lock:
            self._receivers.pop(request_id, None)

    def take_records(self) -> "list[_engine.StepRecord]":
        """The step records that came since the last call."""
        with self._lock:
            taken, self._records = self._records, []
        return taken

    def stop(self) -> None:
        """Stops the engine; whoever still waits gets UnavailableError. Returns, to every caller,
        when both threads have ended."""
        self._engine.stop()
        self._thread.join()

    def _run(self) -> None:
        while (report := self._engine.wait_report(_POLL_S)) is not None:
            if report.installs:
                self._on_installs(report.installs)
            if report.records:
                with self._lock:
                    self._records += report.records
            if report.removed_adapters:
                self._on_removed(report.removed_adapters)
            plain = report.take_plain()
            outputs = [(output.id, _raw(output)) for output in report.outputs]
            if outputs or plain[0]:
                self._deliver(outputs, plain)
        with self._lock:
            self._closed = True
            waiting = list(self._receivers)
        closed = UnavailableError("engine", "was closed before the answer ended")
        self._deliver([(request_id, _failed(closed)) for request_id in waiting])

    def _deliver(
        self,
        outputs: list[tuple[int, RawOutput]],
        plain: tuple[Sequence[int], Sequence[int], Sequence[int]] = ((), (), ()),
    ) -> None:
        """`plain`: ids, first indices and tokens of outputs that are one further token each."""
        steps: dict[StepSink, StepOutputs] = {}
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, RawOutput]]] = {}

        def put(mailbox: Mailbox, output: RawOutput) -> None:
            if mailbox.loop is None:
                mailbox.put(output)
            else:
                by_loop.setdefault(mailbox.loop, []).append((mailbox, output))

        receivers = self._receivers
        with self._lock:
            for request_id, output in outputs:
                receiver = receivers.get(request_id)
                if output.finish_reason:
                    receivers.pop(request_id, None)
                if type(receiver) is tuple:
                    sink, key = receiver
                    steps.setdefault(sink, StepOutputs()).others.append((key, output))
                elif receiver is not None:
                    put(cast(Mailbox, receiver), output)
            for request_id, index, token in zip(*plain, strict=True):
                receiver = receivers.get(request_id)
                if type(receiver) is tuple:
                    sink, key = receiver
                    step = steps.get(sink)
                    if step is None:
                        step = steps[sink] = StepOutputs()
                    step.keys.append(key)
                    step.tokens.append(token)
                elif receiver is not None:
                    put(cast(Mailbox, receiver), _plain(index, token))
        calls: list[tuple[asyncio.AbstractEventLoop, Callable[[Any], None], Any]] = [
            (loop, _put_all, items) for loop, items in by_loop.items()
        ]
        calls += [(sink.loop, sink.take, step) for sink, step in steps.items()]
        for loop, call, items in calls:
            try:
                loop.call_soon_threadsafe(call, items)
            except RuntimeError:  # that loop has been closed, and its readers with it
                continue


_started: "weakref.WeakSet[Delivery]" = weakref.WeakSet()  # a running one is held by its thread
_started_lock = threading.Lock()


@atexit.register
def _stop_all() -> None:
    """A thread that comes back from the engine to an interpreter that is gone aborts the process.
    Runs after all threads that are no daemons, so what they wait for is still answered."""
    with _started_lock:
        deliveries = list(_started)
    for delivery in deliveries:
        delivery.stop()


# A forked child has none of these threads.
os.register_at_fork(after_in_child=_started.clear)
