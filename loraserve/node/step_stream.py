"""StepStream: the answers of many requests on one RPC, one message for all that a step brought.

Each request has a lane. A lane without credit holds its own tokens back and nobody else's.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from loraserve.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    LoraServeError,
    ResourceExhaustedError,
)
from loraserve.node.engine_api import StepOutputs
from loraserve.node.lane import Lane
from loraserve.node.limits import stalled
from loraserve.v1 import common_pb2
from loraserve.v1.inference_pb2 import (
    GenerateRequest,
    StepOutput,
    StepStreamRequest,
    StepStreamResponse,
)
from loraserve.wire_errors import to_detail

_log = logging.getLogger(__name__)

# Of the outputs in one message; well below what a peer takes.
MAX_PART_BYTES = 1 << 20

Key = tuple[str, int]  # request id and attempt
# Serves one request into a lane. Raises LoraServeError.
Serve = Callable[[GenerateRequest, Lane], Awaitable[None]]


class _Part:
    """Of what waits to be written: outputs, then tokens."""

    __slots__ = ("lanes", "outputs", "token_ids")

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []
        self.lanes: list[int] = []
        self.token_ids: list[int] = []


class StepStreamRun:
    """One RPC. Lives on the event loop."""

    def __init__(
        self,
        serve: Serve,
        load: Callable[[], common_pb2.NodeLoad],
        context: Any,
        stall_s: float,
        max_requests: int,
        on_tokens: Callable[[int], None],
    ) -> None:
        """`stall_s`: how long a client may leave a message unread. `max_requests`: at one time,
        with those that the node is about to refuse. `on_tokens` hears how many tokens of lanes
        with numbers a step brought."""
        self._serve = serve
        self._load = load
        self._context = context
        self._stall_s = stall_s
        self._max_requests = max_requests
        self.loop = asyncio.get_running_loop()
        self._on_tokens = on_tokens
        self._lanes: dict[Key, Lane] = {}
        self._numbers: set[int] = set()
        self._pending: list[_Part] = []
        self._ready = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._over = False
        self._told: common_pb2.NodeLoad | None = None

    def time_remaining(self) -> float | None:
        left: float | None = self._context.time_remaining()
        return left

    # From the engine and the lanes

    def take(self, step: StepOutputs) -> None:
        """What a step brought to the lanes with numbers."""
        for lane, output in step.others:
            lane.take(output)
        if not step.keys:
            return
        now = time.monotonic()
        numbers, token_ids = [], []
        for lane, token in zip(step.keys, step.tokens, strict=True):
            if lane.count(token, now):
                numbers.append(lane.number)
                token_ids.append(token)
        self._on_tokens(len(step.keys))
        if numbers:
            self.put_tokens(numbers, token_ids)

    def _part(self, *, for_output: bool) -> _Part:
        # The tasks that a step wakes all run before the writer, which the first of them wakes.
        if not self._pending or (for_output and self._pending[-1].lanes):
            self._pending.append(_Part())
        self._ready.set()
        return self._pending[-1]

    def put(self, output: StepOutput) -> None:
        if not self._over:
            self._part(for_output=True).outputs.append(output)

    def put_tokens(self, lanes: list[int], token_ids: list[int]) -> None:
        """One token each."""
        if not self._over:
            part = self._part(for_output=False)
            part.lanes += lanes
            part.token_ids += token_ids

    async def run(self, requests: Any) -> None:
        """Returns when the client has half-closed and all is told. Raises LoraServeError."""
        reading = asyncio.create_task(self._read(requests))
        writing = asyncio.create_task(self._write())
        try:
            await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
                self._over = True
                self._ready.set()
            await writing
        except LoraServeError:
            # The status goes out after a message that is on its way, not instead of it.
            self._over, self._pending = True, []
            self._ready.set()
            await asyncio.wait({writing}, timeout=self._stall_s)
            raise
        finally:
            tasks = [reading, writing, *(lane.task for lane in self._lanes.values() if lane.task)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, requests: Any) -> None:
        async for message in requests:
            self._take(message)
        await self._idle.wait()

    def _take(self, message: StepStreamRequest) -> None:
        match message.WhichOneof("action"):
            case "submit":
                self._begin(message.submit, message.lane)
            case "cancel":
                for lane in self._lanes_of(message.cancel.request_id):
                    if lane.task is not None:
                        lane.task.cancel()
            case "credit":
                for lane in self._lanes_of(message.credit.request_id):
                    lane.grant(message.credit.tokens)
            case _:
                raise InvalidArgumentError("action", "is none that this node knows")

    def _lanes_of(self, request_id: str) -> list[Lane]:
        # One that is unknown has ended, which its client could not know yet.
        return [lane for (known, _), lane in self._lanes.items() if known == request_id]

    def _begin(self, request: GenerateRequest, number: int) -> None:
        key = request.request_id, request.attempt
        if key in self._lanes:
            twice = f"{request.request_id!r} runs on this stream in that attempt"
            self._fail(request, AlreadyExistsError("request_id", twice))
            return
        if number in self._numbers:
            raise InvalidArgumentError("lane", f"{number} is in use")
        if number and not request.omit_text:
            raise InvalidArgumentError("lane", "goes with omit_text")
        if len(self._lanes) >= self._max_requests:
            self._fail(request, ResourceExhaustedError("requests", f"{len(self._lanes)} run here"))
            return
        lane = self._lanes[key] = Lane(self, number, *key, self._stall_s)
        if number:
            self._numbers.add(number)
        self._idle.clear()
        lane.task = asyncio.create_task(self._run_one(request, lane))
        lane.task.add_done_callback(lambda _: self._ended(key))

    def _ended(self, key: Key) -> None:
        self._numbers.discard(self._lanes.pop(key).number)
        if not self._lanes:
            self._idle.set()

    async def _run_one(self, request: GenerateRequest, lane: Lane) -> None:
        try:
            await self._serve(request, lane)
        except LoraServeError as error:
            self._fail(request, error)
        except Exception:
            _log.exception("unexpected error in a request of a step stream")
            self._fail(
                request, LoraServeError("server", "internal error; the server's log says more")
            )

    def _fail(self, request: GenerateRequest, error: LoraServeError) -> None:
        self.put(
            StepOutput(
                request_id=request.request_id, attempt=request.attempt, error=to_detail(error)
            )
        )

    async def _write(self) -> None:
        while True:
            await self._ready.wait()
            self._ready.clear()
            pending, self._pending = self._pending, []
            for message in self._messages(pending):
                try:
                    await asyncio.wait_for(self._context.write(message), self._stall_s)
                except asyncio.TimeoutError:
                    raise stalled(self._stall_s) from None
            if self._over and not self._pending:
                return

    def _messages(self, pending: list[_Part]) -> Iterator[StepStreamResponse]:
        for part in pending:
            outputs: list[StepOutput] = []
            size = 0
            for output in part.outputs:
                more = output.ByteSize()
                if outputs and size + more > MAX_PART_BYTES:
                    yield self._message(outputs)
                    outputs, size = [], 0
                outputs.append(output)
                size += more
            # Tokens are few: their lanes have had credit for each.
            yield self._message(outputs, part)

    def _message(
        self, outputs: list[StepOutput], tokens: _Part | None = None
    ) -> StepStreamResponse:
        message = StepStreamResponse(outputs=outputs)
        if tokens is not None and tokens.lanes:
            message.tokens.lanes.extend(tokens.lanes)
            message.tokens.token_ids.extend(tokens.token_ids)
        load = self._load()
        if load is not self._told:
            self._told = load
            message.load.CopyFrom(load)
        return message
