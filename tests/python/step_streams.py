"""StepStream as a test speaks it to a node."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from fake_node import FakeEngine, serving
from node_calls import request

from loraserve.errors import (
    LoraServeError,
)
from loraserve.v1 import inference_pb2_grpc
from loraserve.v1.inference_pb2 import StepCancel, StepCredit, StepOutput, StepStreamRequest
from loraserve.wire_errors import from_detail


class Stream:
    """One StepStream as a client without manners would use it. With `lanes`, requests have numbers
    and make their text themselves."""

    def __init__(self, channel: grpc.aio.Channel, lanes: bool = False) -> None:
        self.names: dict[int, str] | None = {} if lanes else None
        self.call: Any = inference_pb2_grpc.InferenceServiceStub(channel).StepStream(timeout=60)
        self.messages: list[Any] = []
        self.outputs: dict[str, list[StepOutput]] = {}

    async def submit(self, request_id: str, **fields: Any) -> None:
        lane = 0
        if self.names is not None:
            fields["omit_text"] = True
            lane = len(self.names) + 1
            self.names[lane] = request_id
        submit = request(request_id, **fields)
        await self.call.write(StepStreamRequest(submit=submit, lane=lane))

    async def cancel(self, request_id: str) -> None:
        await self.call.write(StepStreamRequest(cancel=StepCancel(request_id=request_id)))

    async def credit(self, request_id: str, tokens: int) -> None:
        credit = StepCredit(request_id=request_id, tokens=tokens)
        await self.call.write(StepStreamRequest(credit=credit))

    async def read(self) -> bool:
        message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        self.messages.append(message)
        for output in message.outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        assert len(message.tokens.lanes) == len(message.tokens.token_ids)
        for lane, token in zip(message.tokens.lanes, message.tokens.token_ids, strict=True):
            assert self.names is not None
            self.outputs[self.names[lane]].append(StepOutput(token_ids=[token]))
        return True

    async def read_until_ended(self, *request_ids: str) -> None:
        while not all(self.ended(r) for r in request_ids):
            assert await self.read()

    def ended(self, request_id: str) -> bool:
        last = self.outputs.get(request_id, [])[-1:]
        return any(o.finish_reason or o.HasField("error") for o in last)

    def tokens(self, request_id: str) -> list[int]:
        return [t for o in self.outputs.get(request_id, []) for t in o.token_ids]

    def error(self, request_id: str) -> LoraServeError:
        return from_detail(self.outputs[request_id][-1].error)


@contextlib.asynccontextmanager
async def stream_to(
    engine: FakeEngine, lanes: bool = False, **options: Any
) -> AsyncIterator[tuple[Any, Any, Stream]]:
    async with serving(engine, **options) as (server, channel):
        stream = Stream(channel, lanes)
        try:
            yield server, channel, stream
        finally:
            stream.call.cancel()
