"""What is measured and logged of one HTTP request."""

import contextlib
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

from loraserve.client import Chunk, Completion
from loraserve.errors import InvalidArgumentError, LoraServeError
from loraserve.gateway.metrics import GatewayMetrics
from loraserve.logs import about
from loraserve.tracing import Span

_log = logging.getLogger("loraserve.gateway.requests")
# Of a request; what else stands where a field is named may be of the request's own making.
_FIELD = re.compile(r"[a-z_]{1,40}(\[\d{1,6}\]|\.[a-z_]{1,40}){0,8}")


class AnswerWatch:
    """One answer, from its sending to its end."""

    __slots__ = ("_adapter", "_last_s", "_record")

    def __init__(self, record: "RequestRecord", adapter: str | None) -> None:
        self._record = record
        self._adapter = adapter or ""
        self._last_s = 0.0
        record.metrics.waiting[self._adapter] += 1

    def chunk(self, chunk: Chunk) -> None:
        count = len(chunk.token_ids)
        if not count:
            return
        now, metrics = time.monotonic(), self._record.metrics
        metrics.generated_tokens += count
        if self._last_s:
            metrics.tbt.observe(now - self._last_s)
        else:
            ttft_s = now - self._record.arrival_s
            metrics.ttft.observe(ttft_s)
            self._record.first_token(ttft_s)
            _less(metrics.waiting, self._adapter)
            metrics.running[self._adapter] += 1
        self._last_s = now

    def completed(self, completion: Completion) -> None:
        record, metrics = self._record, self._record.metrics
        metrics.prompt_tokens += completion.prompt_tokens
        metrics.resumes += completion.attempts - 1
        metrics.finished[completion.finish_reason] += 1
        metrics.e2e.observe(time.monotonic() - record.arrival_s)
        record.completions.append(completion)

    def gone(self) -> None:
        """The last of all, however it ended."""
        metrics = self._record.metrics
        _less(metrics.running if self._last_s else metrics.waiting, self._adapter)


class RequestRecord:
    """From a request's arrival to its log line. Never holds a prompt or an answer for the log."""

    def __init__(self, metrics: GatewayMetrics, path: str, *, generates: bool) -> None:
        self.metrics = metrics
        self.path = path
        self._generates = generates
        self.span: Span | None = None
        self.id = uuid.uuid4().hex
        """In the ids of answers, in errors' headers and in the log."""
        self.arrival_s = time.monotonic()
        self.caller = ""
        self.model = ""
        self.status = 0
        self.adapter = ""
        self._failure: dict[str, str] = {}
        self.completions: list[Completion] = []
        self._ttft_s: float | None = None

    def first_token(self, ttft_s: float) -> None:
        if self._ttft_s is None:
            self._ttft_s = ttft_s

    @contextlib.contextmanager
    def answer(self, adapter: str | None) -> Iterator[AnswerWatch]:
        self.adapter = adapter or ""
        watch = AnswerWatch(self, adapter)
        try:
            yield watch
        finally:
            watch.gone()

    def failed(self, error: LoraServeError) -> None:
        """What is wrong with a request may quote it, and is told by its field alone."""
        self._failure = {"error": error.reason}
        if not isinstance(error, InvalidArgumentError):
            self._failure["error_message"] = str(error)[:500]
        elif _FIELD.fullmatch(error.field):
            self._failure["error_field"] = error.field

    def refused(self, param: str) -> None:
        """By HTTP's own rules."""
        self._failure = {"error": "INVALID_ARGUMENT", "error_field": param}

    def _level(self) -> int:
        """What anyone can have refused, at no cost, may not fill a log."""
        refused = 400 <= self.status < 500
        return logging.DEBUG if refused and not (self._generates and self.caller) else logging.INFO

    def end(self) -> None:
        """Counts and logs it; a status of 0 means that the client had gone."""
        self.metrics.requests[self.path, self.status] += 1
        level = self._level()
        logged = bool(self.model or self._failure) and _log.isEnabledFor(level)
        if not logged and self.span is None:
            return
        told = self._told()
        if logged:
            _log.log(level, "request ended", extra=about(shown=True, **told))
        if self.span is not None:
            self._end_span(self.span, told)

    def _end_span(self, span: Span, told: dict[str, Any]) -> None:
        names = {
            "status": "http.response.status_code",
            "model": "gen_ai.request.model",
            "prompt_tokens": "gen_ai.usage.input_tokens",
            "completion_tokens": "gen_ai.usage.output_tokens",
            "ttft_seconds": "gen_ai.server.time_to_first_token",
        }
        error = self._failure.get("error") or ("CANCELLED" if not self.status else None)
        attributes = {
            names.get(name, f"loraserve.{name}"): value
            for name, value in told.items()
            if value not in (None, "")
        }
        span.end(error, attributes)

    def _told(self) -> dict[str, Any]:
        """For the log and the trace."""
        done = self.completions
        told: dict[str, Any] = {
            "request": self.id,
            "path": self.path,
            "status": self.status,
            "caller": self.caller,
            "model": self.model[:200],
            "adapter": self.adapter,
            "seconds": round(time.monotonic() - self.arrival_s, 6),
            "ttft_seconds": None if self._ttft_s is None else round(self._ttft_s, 6),
        }
        if done:
            told |= {
                "revision": done[0].revision,
                "node": ",".join(sorted({completion.node_id for completion in done})),
                "attempt": max(completion.attempts for completion in done) - 1,
                "prompt_tokens": sum(completion.prompt_tokens for completion in done),
                "completion_tokens": sum(len(completion.token_ids) for completion in done),
                "finish_reason": ",".join(sorted({c.finish_reason for c in done})),
            }
        return told | self._failure


def _less(counter: Counter[str], name: str) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]
