"""Requests of a client against nodes that serve and nodes that misbehave, all in this process."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from fake_node import BASE, FakeEngine, serving

from loraserve.client.channels import Channels
from loraserve.client.request_run import RequestRun, Site
from loraserve.client.resume import AnswerLog
from loraserve.client.retry import RetryBudget, RetryPolicy
from loraserve.client.route_table import NodeRoute, RouteTable
from loraserve.client.route_watch import RouteWatch
from loraserve.client.routing import Router, RouteRequest
from loraserve.client.types import Chunk, Completion
from loraserve.node.server import NodeServer
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import inference_pb2, inference_pb2_grpc
from loraserve.v1.inference_pb2 import GenerateRequest, GenerateResponse, GenerateStart
from loraserve.wire import SERVER_OPTIONS, bind

PROMPT = [5, 6]
TOKENS = 6
# What FakeEngine answers, in one go or in several.
ANSWER = [len(PROMPT) + index for index in range(TOKENS)]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))  # type: ignore[arg-type]


def start(**fields: Any) -> GenerateStart:
    """Says the same as a fake node does of a request for the base model."""
    about = {"base": {"name": BASE, "digest": "d" * 64}, "prompt_tokens": len(PROMPT), "seed": 9}
    return GenerateStart(**(about | {"node_id": "bad"} | fields))


def token(index: int, **fields: Any) -> GenerateResponse:
    """The message for one token of ANSWER."""
    if index == 0:
        fields.setdefault("start", start())
    about = {"first_index": index, "token_ids": [ANSWER[index]], "text": f"<{ANSWER[index]}>"}
    return GenerateResponse(**(about | fields))


Generate = Callable[[GenerateRequest, Any], Awaitable[None]]


class BadNode(inference_pb2_grpc.InferenceServiceServicer):
    """Does what a test says with a request. `ended` counts the calls that have returned."""

    def __init__(self, generate: Generate) -> None:
        self._generate = generate
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self.server)
        self.address = bind(self.server, "127.0.0.1:0", None)
        self.requests: list[GenerateRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.ended = 0
        self._stopping: asyncio.Task[None] | None = None

    async def Generate(self, request: GenerateRequest, context: Any) -> None:  # type: ignore[override]
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        try:
            await self._generate(request, context)
        finally:
            self.ended += 1

    def die(self) -> None:
        """Breaks every connection off."""
        self._stopping = asyncio.ensure_future(self.server.stop(None))

    async def close(self) -> None:
        await (self._stopping or self.server.stop(None))


@contextlib.asynccontextmanager
async def bad_node(generate: Generate) -> AsyncIterator[BadNode]:
    node = BadNode(generate)
    await node.server.start()
    try:
        yield node
    finally:
        await node.close()


def abort_with(code: str, details: str = "no") -> Generate:
    """A server that knows nothing of our errors."""

    async def generate(_: GenerateRequest, context: Any) -> None:
        await context.abort(grpc.StatusCode[code], details)

    return generate


def nodes_table(**addresses: str) -> RouteTable:
    """Node ids and addresses. No placement is known."""
    nodes = {i: NodeRoute(i, address, base=BASE) for i, address in addresses.items()}
    return RouteTable(nodes=nodes, every_node=True)


@dataclass
class Client:
    """Asks the nodes in the order of their ids, as far as they are alike."""

    site: Site
    count: int = 0
    log: AnswerLog | None = None
    logs: list[AnswerLog] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """That came for the last request."""
        return len(self.log.token_ids) if self.log else 0

    def run(self, params: SamplingParams | None = None, **fields: Any) -> RequestRun:
        self.count += 1
        timeout_s = fields.pop("timeout_s", None)
        params = params or SamplingParams(max_tokens=TOKENS)
        self.log = log = AnswerLog(f"r{self.count}", PROMPT, params, **fields)
        self.logs.append(log)
        route = RouteRequest(fields.get("base", ""), fields.get("adapter"), fields.get("revision"))
        return RequestRun(self.site, log, route, timeout_s)

    async def answer(self, params: SamplingParams | None = None, **fields: Any) -> Completion:
        """The whole answer, after a check that its chunks are whole too."""
        request = self.run(params, **fields)
        log = self.log
        assert log is not None
        chunks: list[Chunk] = [chunk async for chunk in request.chunks()]
        done = log.completion(request.attempts)
        assert [i for c in chunks for i in c.token_ids] == done.token_ids
        assert "".join(c.text for c in chunks) == done.text
        assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == done.finish_reason
        ends = [c.first_index + len(c.token_ids) for c in chunks]
        assert [c.first_index for c in chunks] == [0, *ends[:-1]]
        return done


@contextlib.asynccontextmanager
async def client(
    routes: RouteTable | None = None,
    policy: RetryPolicy | None = None,
    controller: str | None = None,
    api_key: str | None = None,
) -> AsyncIterator[Client]:
    """By a table made by hand or the one of a controller."""
    channels = Channels(api_key)
    policy = policy or RetryPolicy()
    router = Router(time.monotonic, lambda: 0.0, routes)
    watch = RouteWatch(channels, controller, router.set_table) if controller else None
    if watch is not None:
        watch.start()
    try:
        yield Client(Site(channels, router, watch, policy, RetryBudget(policy)))
    finally:
        if watch is not None:
            await watch.stop()
        await channels.close()


@contextlib.asynccontextmanager
async def good_node(
    step_s: float = 0.0, **options: Any
) -> AsyncIterator[tuple[FakeEngine, NodeServer]]:
    engine = FakeEngine(step_s)
    async with serving(engine, **{"node_id": "good", **options}) as (server, _):
        yield engine, server


def finish(index: int, **fields: Any) -> GenerateResponse:
    """The last message for one token of ANSWER."""
    return token(index, finish_reason=inference_pb2.FINISH_REASON_LENGTH, **fields)
