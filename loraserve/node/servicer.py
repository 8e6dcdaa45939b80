"""InferenceService: a request from its arrival to its last token."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

from loraserve.errors import CancelledError, DeadlineExceededError, LoraServeError
from loraserve.node.answer import Answer
from loraserve.node.convert import check_base_of_node, seconds
from loraserve.node.engine_api import RequestStream
from loraserve.node.held import HeldAdapter
from loraserve.node.lane import Lane
from loraserve.node.limits import check_request, stalled
from loraserve.node.node import Node
from loraserve.node.record import AttemptRecord
from loraserve.node.requests import LiveRequest
from loraserve.node.sampling import sampling_from_wire
from loraserve.node.step_stream import StepStreamRun
from loraserve.placement.types import AdapterId
from loraserve.security import current_identity
from loraserve.security.identity import check_name, check_revision
from loraserve.tracing import Span
from loraserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from loraserve.wire_errors import typed_errors

# Longer texts are tokenized in a thread, so that the streams of others go on.
_INLINE_CHARACTERS = 4096
_LONGEST_S = 7 * 24 * 3600.0


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, node: Callable[[], Node]) -> None:
        """`node` raises UnavailableError until there is one."""
        self._node = node

    @typed_errors
    async def StepStream(self, requests: Any, context: Any) -> None:  # type: ignore[override]
        """Writes its responses itself, as Generate does."""
        node, tenant = self._node(), current_identity().tenant

        async def serve(request: inference_pb2.GenerateRequest, lane: Lane) -> None:
            await self._counted(node, request, lane, tenant)

        most = 2 * node.limits.max_requests
        count = node.metrics.generated_tokens.inc
        stall_s = node.limits.stall_timeout_s
        await StepStreamRun(serve, node.load, context, stall_s, most, count).run(requests)

    @typed_errors
    async def Generate(  # type: ignore[override]
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """Writes its responses itself: a cancelled RPC then ends in this very frame."""
        await self._counted(self._node(), request, context, current_identity().tenant)

    async def _counted(
        self, node: Node, request: inference_pb2.GenerateRequest, context: Any, tenant: str
    ) -> None:
        """`context` is that of an RPC or a Lane."""
        code = "INTERNAL"
        record = AttemptRecord(request, tenant, node.node_id, _span(node, request, context))
        try:
            await self._generate(node, request, context, tenant, record)
            code = "OK"
        except LoraServeError as error:
            code = error.code
            raise
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        finally:
            node.metrics.requests.labels(code).inc()
            record.end(code)

    async def _generate(
        self,
        node: Node,
        request: inference_pb2.GenerateRequest,
        context: Any,
        tenant: str,
        record: AttemptRecord,
    ) -> None:
        arrival_s = time.monotonic()
        node.check_accepting()
        check_request(request, node.limits, node.facts.context_tokens)
        params = sampling_from_wire(request.sampling, request.start_index)
        adapter = _adapter(request.adapter, tenant, node.facts.base)
        deadline_s = arrival_s + _time_left(request, context)
        live = node.requests.add(tenant, request.request_id, request.attempt)
        live.task = asyncio.current_task()
        live.adapter = request.adapter.name
        live.end_after(
            deadline_s - time.monotonic(), DeadlineExceededError("deadline", "has passed")
        )
        held: HeldAdapter | None = None
        try:
            prompt_ids = await _prompt_ids(node, request)
            if adapter is not None:
                held = await _acquire(node, adapter, request, live, deadline_s)
                live.rank = held.spec.max_rank
            left_s = _left(live, deadline_s)
            answer = Answer(node, request, params, len(prompt_ids), held, arrival_s)
            record.answer = answer
            live.queued_prefill_tokens = len(prompt_ids) + request.start_index
            prompt_ids += request.emitted_token_ids
            about: dict[str, Any] = {
                "adapter": held.engine_name if held else None,
                "request_id": live.engine_request_id,
                "priority": request.priority,
                "tenant": tenant,
                "timeout_s": left_s,
                "start_index": request.start_index,
            }
            if isinstance(context, Lane) and context.number:
                lane, sink = context, context.sink
                with answer:
                    await lane.serve(
                        lambda: node.engine.submit_to(sink, lane, prompt_ids, params, **about),
                        answer,
                        live,
                    )
                return
            loop = asyncio.get_running_loop()
            stream = node.engine.submit(prompt_ids, params, loop=loop, **about)
            await _write(stream, answer, live, context, node.limits.stall_timeout_s)
        except asyncio.CancelledError:
            if live.cut_off:
                raise live.ended_by or _aborted() from None
            raise
        finally:
            if held is not None:
                node.adapters.release(held, live)
            node.requests.remove(live)


def _span(node: Node, request: inference_pb2.GenerateRequest, context: Any) -> Span | None:
    """Of an attempt, where the node is to trace."""
    if node.tracer is None:
        return None
    parent = request.traceparent
    if not parent and not isinstance(context, Lane):
        metadata = context.invocation_metadata() or ()
        parent = next((str(v) for k, v in metadata if k == "traceparent"), "")
    about: dict[str, str | int] = {
        "loraserve.request": request.request_id[:128],
        "loraserve.attempt": request.attempt,
        "loraserve.node": node.node_id,
        "gen_ai.request.model": request.adapter.name or node.facts.base,
    }
    return node.tracer.serve("generate", parent, about)


async def _write(
    stream: RequestStream, answer: Answer, live: LiveRequest, context: Any, stall_s: float
) -> None:
    live.abort = stream.abort
    too_slow = stalled(stall_s)
    chunks: Any = stream.chunks()
    with answer:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                if chunk.finish_reason == "cancelled" and live.ended_by is not None:
                    raise live.ended_by
                for response in answer.responses(chunk):
                    with live.cut_off_after(stall_s, too_slow):
                        await context.write(response)
                live.answered()


def _adapter(ref: common_pb2.AdapterRef, tenant: str, served_base: str) -> AdapterId | None:
    """The adapter that is meant, None for the base model. Raises InvalidArgumentError,
    FailedPreconditionError."""
    base = check_base_of_node(ref.base, served_base)
    if ref.HasField("revision"):
        check_revision("adapter.revision", ref.revision)
    if not ref.name:
        return None
    return AdapterId(tenant, base, check_name("adapter.name", ref.name))


def _time_left(request: inference_pb2.GenerateRequest, context: Any) -> float:
    """Seconds until the request's or the RPC's deadline. Raises DeadlineExceededError."""
    left_s: float = _LONGEST_S
    rpc_s = context.time_remaining()
    if rpc_s is not None:
        left_s = min(left_s, rpc_s)
    if request.HasField("timeout"):
        left_s = min(left_s, seconds(request.timeout))
    if left_s <= 0:
        raise DeadlineExceededError("timeout", "the deadline had passed on arrival")
    return left_s


async def _prompt_ids(node: Node, request: inference_pb2.GenerateRequest) -> list[int]:
    if request.WhichOneof("prompt") == "token_ids":
        return node.engine.encode(list(request.token_ids.ids))
    if len(request.text) <= _INLINE_CHARACTERS:
        return node.engine.encode(request.text)
    return await asyncio.to_thread(node.engine.encode, request.text)


async def _acquire(
    node: Node,
    adapter: AdapterId,
    request: inference_pb2.GenerateRequest,
    live: LiveRequest,
    deadline_s: float,
) -> HeldAdapter:
    """The adapter's copy, pinned; waits for it until the deadline or an abort. Raises
    StaleRouteError where routes were wrong that it is here."""
    ref = request.adapter
    revision = ref.revision if ref.HasField("revision") else None
    held = node.adapters.acquire_now(adapter, revision, live)
    if held is not None:
        return held
    if request.HasField("routes") and not node.adapters.has_or_awaits(adapter, revision):
        routes = (request.routes.epoch, request.routes.version)
        raise node.moved.refusal(adapter, revision, routes)
    task = asyncio.ensure_future(node.adapters.acquire(adapter, revision, live))
    ends: set[asyncio.Future[Any]] = {task, live.stopped}
    try:
        await asyncio.wait(
            ends,
            timeout=max(0.0, deadline_s - time.monotonic()),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not task.done():
            _left(live, deadline_s)
            raise DeadlineExceededError("deadline", "passed while the adapter was loaded")
    except BaseException:
        task.add_done_callback(lambda ended: _discard(node, ended, live))
        task.cancel()
        raise
    return task.result()


def _discard(node: Node, task: "asyncio.Task[HeldAdapter]", live: LiveRequest) -> None:
    """The copy came when its request had gone."""
    if not task.cancelled() and task.exception() is None:
        node.adapters.release(task.result(), live)


def _aborted() -> CancelledError:
    return CancelledError("request_id", "the request was aborted")


def _left(live: LiveRequest, deadline_s: float) -> float:
    """Seconds that the request has. Raises DeadlineExceededError, or what ended the request."""
    if live.stopped.done():
        raise live.ended_by or _aborted()
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise DeadlineExceededError("deadline", "has passed")
    return left_s
