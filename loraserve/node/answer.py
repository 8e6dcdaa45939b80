"""From the engine's chunks to the messages of one answer, with what is counted on the way."""

import time
from types import TracebackType

from loraserve.errors import LoraServeError
from loraserve.node.engine_api import OutputChunk
from loraserve.node.held import HeldAdapter
from loraserve.node.node import Node
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import common_pb2, inference_pb2
from loraserve.v1.inference_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    GenerateResponse,
    PositionLogprobs,
    TokenLogprob,
)

_FINISH = {
    "stop": FINISH_REASON_STOP,
    "length": FINISH_REASON_LENGTH,
    "cancelled": FINISH_REASON_CANCELLED,
}


class Answer:
    """One attempt. A context manager around its chunks; `response` is called for each in order."""

    def __init__(
        self,
        node: Node,
        request: inference_pb2.GenerateRequest,
        params: SamplingParams,
        prompt_tokens: int,
        held: HeldAdapter | None,
        arrival_s: float,
    ) -> None:
        """`arrival_s` is on time.monotonic's clock; the request is submitted now."""
        self._node = node
        self._request_id = request.request_id
        self._attempt = request.attempt
        self._start_index = request.start_index
        self._seed = params.seed or 0
        self._prompt_tokens = prompt_tokens
        self._revision = held.spec.revision if held else ""
        self._demand = node.demand.of(held.spec.adapter) if held else None
        self._arrival_s = arrival_s
        self._submitted_s = time.monotonic()
        self._last_s = 0.0
        self._tokens = request.start_index
        self._cached_tokens = 0
        self._queue_s = 0.0
        self._load: common_pb2.NodeLoad | None = None

    def __enter__(self) -> "Answer":
        prefill = self._prompt_tokens + self._start_index
        self._node.metrics.prompt_tokens.inc(self._prompt_tokens)
        if self._demand is not None:
            self._demand.users += 1
            self._demand.requests += 1
            self._demand.prefill_tokens += prefill
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._demand is not None:
            self._demand.users -= 1

    def response(self, chunk: OutputChunk) -> GenerateResponse:
        """The message for one chunk."""
        ids = chunk.token_ids
        response = GenerateResponse(
            request_id=self._request_id,
            attempt=self._attempt,
            first_index=self._start_index + chunk.first_index,
            token_ids=ids,
            text=chunk.text or "",
        )
        if ids:
            self._count(len(ids))
        if chunk.logprobs:
            _add_logprobs(response, chunk)
        if self._load is None:
            self._cached_tokens = chunk.cached_tokens
            self._queue_s = chunk.queue_s
            response.start.CopyFrom(self._start())
        load = self._node.load()
        if load is not self._load:
            self._load = load
            response.load.CopyFrom(load)
        if chunk.finish_reason is not None:
            self._finish(response, chunk)
        return response

    def _count(self, tokens: int) -> None:
        now = time.monotonic()
        metrics = self._node.metrics
        if self._last_s:
            metrics.token_after(now - self._last_s)
        else:
            metrics.first_token_after(now - self._arrival_s)
        self._last_s = now
        self._tokens += tokens
        metrics.generated_tokens.inc(tokens)
        if self._demand is not None:
            self._demand.decode_tokens += tokens

    def _start(self) -> inference_pb2.GenerateStart:
        return inference_pb2.GenerateStart(
            revision=self._revision,
            base=self._node.base,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_tokens,
            seed=self._seed,
            node_id=self._node.node_id,
            queue_time_us=self._queue_time_us(),
            prefill_time_us=max(0, self._since_arrival_us() - self._queue_time_us()),
        )

    def _queue_time_us(self) -> int:
        return round((self._submitted_s - self._arrival_s + self._queue_s) * 1e6)

    def _since_arrival_us(self) -> int:
        return round((time.monotonic() - self._arrival_s) * 1e6)

    def _finish(self, response: GenerateResponse, chunk: OutputChunk) -> None:
        reason = _FINISH.get(chunk.finish_reason or "")
        if reason is None:
            raise LoraServeError("finish_reason", f"{chunk.finish_reason!r} of the engine")
        response.finish_reason = reason
        usage = response.usage
        usage.prompt_tokens = self._prompt_tokens
        usage.completion_tokens = self._tokens
        usage.cached_prompt_tokens = self._cached_tokens
        usage.queue_time_us = self._queue_time_us()
        if isinstance(chunk.stop_reason, str):
            usage.stop_string = chunk.stop_reason
        elif chunk.stop_reason is not None:
            usage.stop_token_id = chunk.stop_reason


def _add_logprobs(response: GenerateResponse, chunk: OutputChunk) -> None:
    tops = chunk.top_logprobs or [{}] * len(chunk.logprobs)
    for logprob, top in zip(chunk.logprobs, tops, strict=True):
        ranked = sorted(top.items(), key=lambda item: -item[1])
        response.logprobs.append(
            PositionLogprobs(
                logprob=logprob,
                top=[TokenLogprob(token_id=i, logprob=value) for i, value in ranked],
            )
        )
