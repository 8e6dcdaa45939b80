"""Many requests on one StepStream for each node: what a gateway saves a message per token with."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from loraserve.client.channels import Channels, closed
from loraserve.client.resume import lost
from loraserve.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    InvalidArgumentError,
    LoraServeError,
    UnavailableError,
)
from loraserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from loraserve.v1.inference_pb2 import StepOutput, StepStreamRequest
from loraserve.wire import MAX_MESSAGE_BYTES
from loraserve.wire_errors import from_detail, from_rpc_error

# A request gets new credit when its reader has taken so many tokens of what the node grants first.
CREDIT_STEP = 128

Key = tuple[str, int]  # request id and attempt
Observe = Callable[[common_pb2.NodeLoad], None]


class MuxAttempt:
    """One attempt of a request. Read by one task; `close` it in any case."""

    __slots__ = (*("_ended", "_items", "_key", "_stream", "_taken", "_timer", "_waiter", "number"),)

    def __init__(self, stream: "_Stream", key: Key, number: int) -> None:
        self._stream = stream
        self._key = key
        self.number = number
        # What its reader has not taken yet; tokens that came in a row are one list.
        self._items: deque[StepOutput | list[int] | LoraServeError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._taken = 0
        self._ended = False

    def end_after(self, timeout_s: float) -> None:
        late = DeadlineExceededError("timeout_s", "the node did not end the request in time")
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self.put, late)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def put(self, item: StepOutput | LoraServeError) -> None:
        self._items.append(item)
        self._wake()

    def put_token(self, token: int) -> None:
        items = self._items
        if items and type(last := items[-1]) is list:
            last.append(token)
        else:
            items.append([token])
        self._wake()

    async def get(self) -> StepOutput | list[int]:
        """The next output, or tokens that are all there is to tell. Raises LoraServeError: what
        ended the request, or the stream."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._items.popleft()
        if type(item) is list:
            self._took(len(item))
            return item
        if isinstance(item, LoraServeError):
            raise item
        assert isinstance(item, StepOutput)
        if item.HasField("error"):
            raise from_detail(item.error)
        self._ended = bool(item.finish_reason)
        self._took(len(item.token_ids))
        return item

    def _took(self, tokens: int) -> None:
        self._taken += tokens
        if self._taken >= CREDIT_STEP and not self._ended:
            credit = inference_pb2.StepCredit(request_id=self._key[0], tokens=self._taken)
            self._stream.send(StepStreamRequest(credit=credit))
            self._taken = 0

    async def close(self) -> None:
        """Cancels the request where it has not ended. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self._stream.forget(self._key, self) and not self._ended and not self._stream.broken:
            cancel = inference_pb2.StepCancel(request_id=self._key[0])
            self._stream.send(StepStreamRequest(cancel=cancel))


class _Stream:
    """One RPC, from its first request until it breaks."""

    def __init__(self, channels: Channels, address: str, observe: Observe) -> None:
        self._channels = channels
        self._observe = observe
        stub = inference_pb2_grpc.InferenceServiceStub(channels.get(address))
        self._call: Any = stub.StepStream(metadata=channels.metadata)
        self._attempts: dict[Key, MuxAttempt] = {}
        # Credit and cancellation name a request without its attempt.
        self._ids: set[str] = set()
        self._numbered: dict[int, MuxAttempt] = {}
        self._numbers = itertools.count(1)
        self._outgoing: deque[StepStreamRequest] = deque()
        self._more = asyncio.Event()
        self.broken = False
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    @property
    def used(self) -> bool:
        return bool(self._attempts)

    def begin(self, request: inference_pb2.GenerateRequest) -> MuxAttempt:
        """Raises AlreadyExistsError, and InvalidArgumentError for what no node would take: the
        stream, which others use, would end with it."""
        if request.request_id in self._ids:
            raise AlreadyExistsError("request_id", f"{request.request_id!r} runs already")
        key = request.request_id, request.attempt
        # A number is used once: tokens that come late for one that has gone mean nobody else.
        number = next(self._numbers) if request.omit_text else 0
        message = StepStreamRequest(submit=request, lane=number)
        if (size := message.ByteSize()) > MAX_MESSAGE_BYTES:
            raise InvalidArgumentError(
                "prompt", f"the request has {size} bytes, the limit is {MAX_MESSAGE_BYTES}"
            )
        self._ids.add(request.request_id)
        attempt = self._attempts[key] = MuxAttempt(self, key, number)
        if number:
            self._numbered[number] = attempt
        self.send(message)
        return attempt

    def forget(self, key: Key, attempt: MuxAttempt) -> bool:
        """Whether it was known until now."""
        self._numbered.pop(attempt.number, None)
        if self._attempts.get(key) is not attempt:
            return False
        del self._attempts[key]
        self._ids.discard(key[0])
        return True

    def close(self) -> None:
        """Of one that nobody uses."""
        self._tasks[0].cancel()

    def send(self, message: StepStreamRequest) -> None:
        self._outgoing.append(message)
        self._more.set()

    async def _write(self) -> None:
        try:
            while True:
                while self._outgoing:
                    await self._call.write(self._outgoing.popleft())
                self._more.clear()
                await self._more.wait()
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            pass  # the reader is told why

    def _take(self, message: inference_pb2.StepStreamResponse) -> None:
        if message.HasField("load"):
            self._observe(message.load)
        for output in message.outputs:
            attempt = self._attempts.get((output.request_id, output.attempt))
            if attempt is not None:  # else nobody reads it any more
                attempt.put(output)
        lanes, token_ids = message.tokens.lanes, message.tokens.token_ids
        if len(lanes) != len(token_ids):
            raise lost(f"{len(token_ids)} tokens for {len(lanes)} lanes")
        numbered = self._numbered
        for number, token in zip(lanes, token_ids, strict=True):
            attempt = numbered.get(number)
            if attempt is not None:
                attempt.put_token(token)

    async def _read(self) -> None:
        error: LoraServeError = lost("the node ended the stream")
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._take(message)
            if await self._call.code() is not grpc.StatusCode.OK:
                error = UnavailableError("stream", await self._call.details() or "was ended")
        except asyncio.CancelledError:
            error = closed() if self._channels.closed else lost("the stream was closed")
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
        except grpc.aio.UsageError:
            error = closed()
        except UnavailableError as senseless:
            error = senseless
        finally:
            self.broken = True
            self._call.cancel()
            self._tasks[1].cancel()
            for attempt in self._attempts.values():
                attempt.put(error)


class StepMux:
    """Lives on one event loop."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._streams: dict[str, _Stream] = {}

    def keep(self, addresses: set[str]) -> None:
        """Closes and forgets streams to other nodes that no request uses."""
        gone = [a for a, s in self._streams.items() if a not in addresses and not s.used]
        for address in gone:
            self._streams.pop(address).close()

    def begin(
        self,
        address: str,
        request: inference_pb2.GenerateRequest,
        timeout_s: float | None,
        observe: Observe,
    ) -> MuxAttempt:
        """Sends an attempt. `observe` gets what the node says of its load. Raises
        LoraServeError."""
        stream = self._streams.get(address)
        if stream is None or stream.broken:
            stream = self._streams[address] = _Stream(self._channels, address, observe)
        attempt = stream.begin(request)
        if timeout_s is not None:
            attempt.end_after(timeout_s)
        return attempt
