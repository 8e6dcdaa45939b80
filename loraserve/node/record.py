"""One attempt's line in the node's log and its span. Never a prompt or an answer."""

import logging
import time

from loraserve.logs import about
from loraserve.node.answer import Answer
from loraserve.tracing import Span
from loraserve.v1.inference_pb2 import GenerateRequest

_log = logging.getLogger("loraserve.node.requests")


class AttemptRecord:
    """From the attempt's arrival to its end. `answer` is set once its adapter is there."""

    __slots__ = ("_arrival_s", "_node_id", "_request", "_span", "_tenant", "answer")

    def __init__(
        self, request: GenerateRequest, tenant: str, node_id: str, span: Span | None
    ) -> None:
        self._request = request
        self._tenant = tenant
        self._node_id = node_id
        self._span = span
        self._arrival_s = time.monotonic()
        self.answer: Answer | None = None

    def end(self, code: str) -> None:
        """`code`: a google.rpc.Code."""
        logged = _log.isEnabledFor(logging.DEBUG)
        if not logged and self._span is None:
            return
        request, answer = self._request, self.answer
        told = answer.told() if answer is not None else {}
        if logged:
            _log.debug(
                "attempt ended",
                extra=about(
                    shown=True,
                    request=request.request_id[:128],
                    adapter=request.adapter.name[:64],
                    node=self._node_id,
                    attempt=request.attempt,
                    tenant=self._tenant,
                    code=code,
                    seconds=round(time.monotonic() - self._arrival_s, 6),
                    **told,
                ),
            )
        if self._span is not None:
            self._span.end(
                None if code == "OK" else code,
                {f"loraserve.{name}": value for name, value in told.items()},
            )
