"""One request of a StepStream: what stands for the RPC of Generate.

A request with a lane number gets its outputs from the engine step by step, without a task that
wakes for each: most tokens are counted and leave for the step's one message in a few microseconds.
The others are served as Generate serves them, by a task of their own that writes here.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from loraserve.errors import LoraServeError, ResourceExhaustedError
from loraserve.node.answer import Answer
from loraserve.node.engine_api import SinkOutput, StepSink, SunkStream
from loraserve.node.limits import stalled
from loraserve.node.requests import LiveRequest
from loraserve.v1.inference_pb2 import GenerateResponse, StepOutput

START_CREDIT = 256
MAX_CREDIT = 1 << 20
# Outputs and tokens of one request that wait for credit: more than any model makes in the time that
# a client has to take some, and a bound on what one that takes none costs in memory.
MAX_BACKLOG = 1 << 14


class Outbox(StepSink, Protocol):
    """The stream that a lane is of; the engine gives it what it has for the lanes."""

    def put(self, output: StepOutput) -> None: ...
    def put_tokens(self, lanes: list[int], token_ids: list[int]) -> None: ...
    def time_remaining(self) -> float | None: ...


class Lane:
    """Lives on the event loop."""

    __slots__ = (
        *("_answer", "_attempt", "_backlog", "_credit", "_done", "_live", "_more", "_outbox"),
        *("_request_id", "_stall_s", "_stall_timer", "_stream", "number", "sink", "task"),
    )

    def __init__(
        self, outbox: Outbox, number: int, request_id: str, attempt: int, stall_s: float
    ) -> None:
        """`number`: 0 for a request that is served as Generate does."""
        self._outbox = outbox
        self.sink: StepSink = outbox
        self.number = number
        self._request_id = request_id
        self._attempt = attempt
        self._stall_s = stall_s
        self._credit = START_CREDIT
        self._more: asyncio.Event | None = None
        self.task: asyncio.Task[None] | None = None
        self._answer: Answer | None = None
        self._live: LiveRequest | None = None
        self._stream: SunkStream | None = None
        self._done: asyncio.Future[None] | None = None
        # What waits for credit: tokens, and the outputs among them.
        self._backlog: list[int | StepOutput] = []
        self._stall_timer: asyncio.TimerHandle | None = None

    def time_remaining(self) -> float | None:
        """Seconds until the RPC's own deadline."""
        return self._outbox.time_remaining()

    def grant(self, tokens: int) -> None:
        self._credit = min(MAX_CREDIT, self._credit + tokens)
        if self._credit <= 0:
            return
        if self._more is not None:
            self._more.set()
        if self._backlog:
            self._flush()

    # As Generate

    async def write(self, response: GenerateResponse) -> None:
        """Returns when there is credit and the response is on its way."""
        while self._credit <= 0:
            self._more = self._more or asyncio.Event()
            self._more.clear()
            await self._more.wait()
        self._credit -= len(response.token_ids)
        self._outbox.put(_output(response))

    # Step by step

    async def serve(
        self, submit: Callable[[], SunkStream], answer: Answer, live: LiveRequest
    ) -> None:
        """Submits the request and returns when its last output is on its way. Raises what ended
        it. Cancelled, it aborts the request."""
        self._answer, self._live = answer, live
        self._done = asyncio.get_running_loop().create_future()
        stream = self._stream = submit()
        live.abort = stream.abort
        ended = False
        try:
            await self._done
            ended = True
        finally:
            self._answer = None
            if self._stall_timer is not None:
                self._stall_timer.cancel()
            if not ended:
                stream.abort()
            stream.close()

    def count(self, token: int, now: float) -> bool:
        """One further token of the engine; whether it leaves with this step."""
        answer = self._answer
        if answer is None:  # nobody wants it any more
            return False
        answer.token(now)
        if self._credit <= 0:
            self._hold(token)
            return False
        self._credit -= 1
        return True

    def take(self, output: SinkOutput) -> None:
        """Any other output of the engine."""
        answer, live, done, stream = self._answer, self._live, self._done, self._stream
        if answer is None or live is None or done is None or stream is None or done.done():
            return
        try:
            chunk = stream.chunk(output)
            if chunk.finish_reason == "cancelled" and live.ended_by is not None:
                raise live.ended_by
            responses = [_output(response) for response in answer.responses(chunk)]
        except LoraServeError as error:
            done.set_exception(error)
            return
        live.answered()
        for response in responses:
            if self._credit <= 0:
                self._hold(response)
            else:
                self._credit -= len(response.token_ids)
                self._outbox.put(response)
        if chunk.finish_reason is not None and not self._backlog:
            done.set_result(None)

    def _hold(self, item: int | StepOutput) -> None:
        if len(self._backlog) >= MAX_BACKLOG:
            if self._done is not None and not self._done.done():
                waits = f"{MAX_BACKLOG} outputs wait for a client that takes none"
                self._done.set_exception(ResourceExhaustedError("credit", waits))
            return
        self._backlog.append(item)
        if self._stall_timer is None:
            loop = asyncio.get_running_loop()
            self._stall_timer = loop.call_later(self._stall_s, self._stalled)

    def _stalled(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(stalled(self._stall_s))

    def _flush(self) -> None:
        """All that waited goes at once; the credit may fall below zero by it."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        backlog, self._backlog = self._backlog, []
        ids: list[int] = []
        for item in [*backlog, None]:
            if isinstance(item, int):
                ids.append(item)
                continue
            if ids:
                self._outbox.put_tokens([self.number] * len(ids), ids)
                self._credit -= len(ids)
                ids = []
            if item is not None:
                self._credit -= len(item.token_ids)
                self._outbox.put(item)
                if item.finish_reason and self._done is not None and not self._done.done():
                    self._done.set_result(None)


def _output(response: GenerateResponse) -> StepOutput:
    output = StepOutput(
        request_id=response.request_id,
        attempt=response.attempt,
        first_index=response.first_index,
        token_ids=response.token_ids,
        text=response.text,
        finish_reason=response.finish_reason,
    )
    if response.logprobs:
        output.logprobs.extend(response.logprobs)
    if response.prompt_logprobs:
        output.prompt_logprobs.extend(response.prompt_logprobs)
    if response.HasField("start"):
        output.start.CopyFrom(response.start)
    if response.HasField("usage"):
        output.usage.CopyFrom(response.usage)
    return output
