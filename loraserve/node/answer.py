"""From the engine's chunks to the messages of one answer, with what is counted on the way."""

import time
from collections.abc import Mapping, Sequence
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


# Positions in one message: well below what a peer takes, with 64 likeliest tokens for each.
_PROMPT_LOGPROBS_PART = 1024


class Answer:
    """One attempt. A context manager around its chunks; `responses` is called for each in order."""

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
        self._first_s = self._last_s = 0.0
        self._finish_reason = ""
        self._tokens = request.start_index
        self._cached_tokens = 0
        self._queue_s = 0.0
        self._load: common_pb2.NodeLoad | None = None
        self._tbt = node.metrics.tbt
        self._omits_text = request.omit_text

    def __enter__(self) -> "Answer":
        prefill = self._prompt_tokens + self._start_index
        metrics = self._node.metrics
        metrics.prompt_tokens.inc(self._prompt_tokens)
        if self._start_index:
            metrics.resumed.inc()
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

    def told(self) -> dict[str, str | int | float]:
        """Of the answer so far, for logs and traces."""
        found: dict[str, str | int | float] = {
            "revision": self._revision,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "finish_reason": self._finish_reason,
        }
        if self._first_s:
            found["ttft_seconds"] = round(self._first_s - self._arrival_s, 6)
            found["queue_seconds"] = round(self._queue_time_us() / 1e6, 6)
        return found

    def responses(self, chunk: OutputChunk) -> list[GenerateResponse]:
        """The messages for one chunk: one, but for the log-probabilities of a long prompt."""
        if not chunk.prompt_logprobs:
            return [self._response(chunk)]
        told = _positions(chunk.prompt_logprobs[1:], (chunk.prompt_top_logprobs or [])[1:])
        parts = []
        last = self._response(chunk)
        while len(told) > _PROMPT_LOGPROBS_PART:
            part, told = told[:_PROMPT_LOGPROBS_PART], told[_PROMPT_LOGPROBS_PART:]
            parts.append(
                GenerateResponse(
                    request_id=self._request_id,
                    attempt=self._attempt,
                    first_index=last.first_index,
                    prompt_logprobs=part,
                )
            )
        last.prompt_logprobs.extend(told)
        if parts:  # what says that the attempt has begun comes first
            parts[0].start.CopyFrom(last.start)
            last.ClearField("start")
        return [*parts, last]

    def _response(self, chunk: OutputChunk) -> GenerateResponse:
        ids = chunk.token_ids
        response = GenerateResponse(
            request_id=self._request_id,
            attempt=self._attempt,
            first_index=self._start_index + chunk.first_index,
            token_ids=ids,
            text="" if self._omits_text else chunk.text or "",
        )
        if ids:
            self._count(len(ids))
        if chunk.logprobs:
            response.logprobs.extend(_positions(chunk.logprobs, chunk.top_logprobs))
        if self._load is None:
            self._cached_tokens = chunk.cached_tokens
            self._queue_s = chunk.queue_s
            response.start.CopyFrom(self._start())
            self._node.metrics.queue_wait.observe(self._queue_time_us() / 1e6)
        load = self._node.load()
        if load is not self._load:
            self._load = load
            response.load.CopyFrom(load)
        if chunk.finish_reason is not None:
            self._finish(response, chunk)
        return response

    def token(self, now: float) -> None:
        """One further token, which needs no message of its own. The node's count of tokens is the
        caller's to raise."""
        self._tbt.observe(now - self._last_s)
        self._last_s = now
        self._tokens += 1
        if self._demand is not None:
            self._demand.decode_tokens += 1

    def _count(self, tokens: int) -> None:
        now = time.monotonic()
        metrics = self._node.metrics
        if self._last_s:
            metrics.tbt.observe(now - self._last_s)
        else:
            self._first_s = now
            metrics.ttft.observe(now - self._arrival_s)
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
        metrics = self._node.metrics
        self._finish_reason = chunk.finish_reason or ""
        metrics.finished[self._finish_reason] += 1
        metrics.e2e.observe(time.monotonic() - self._arrival_s)
        usage = response.usage
        usage.prompt_tokens = self._prompt_tokens
        usage.completion_tokens = self._tokens
        usage.cached_prompt_tokens = self._cached_tokens
        usage.queue_time_us = self._queue_time_us()
        if isinstance(chunk.stop_reason, str):
            usage.stop_string = chunk.stop_reason
        elif chunk.stop_reason is not None:
            usage.stop_token_id = chunk.stop_reason


def _positions(
    logprobs: Sequence[float | None], tops: Sequence[Mapping[int, float] | None]
) -> list[PositionLogprobs]:
    """`tops`: as many, or none."""
    found = []
    for logprob, top in zip(logprobs, tops or [None] * len(logprobs), strict=True):
        ranked = sorted((top or {}).items(), key=lambda item: -item[1])
        found.append(
            PositionLogprobs(
                logprob=logprob or 0.0,
                top=[TokenLogprob(token_id=i, logprob=value) for i, value in ranked],
            )
        )
    return found
