"""One HTTP connection: uvicorn's protocol with bounds on what a client may cost before and after
its request is there."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loraserve.gateway.openai_errors import HttpError, error_body

MAX_HEADER_BYTES = 32 << 10
MAX_HEADERS = 128
HEADERS_TIMEOUT_S = 10.0
# A client that takes nothing of its answer for so long is cut off.
STALL_TIMEOUT_S = 30.0
# For a body that nobody reads, as its request was refused. One that is read has its own, shorter
# time, whose end is an answer.
UNREAD_BODY_TIMEOUT_S = 35.0
SCOPE_KEY = "loraserve.connection"

_REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


class BoundedConnection(HttpToolsProtocol):
    """Headers must come within a time and a size, answers must be taken; `on_lost` is called when
    the client has gone."""

    headers_timeout_s = HEADERS_TIMEOUT_S
    stall_timeout_s = STALL_TIMEOUT_S
    unread_body_timeout_s = UNREAD_BODY_TIMEOUT_S
    max_connections = 1 << 16

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.on_lost: Callable[[], None] | None = None
        self.lost = False
        self._header_bytes = 0
        self._in_headers = True
        self._headers_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(503, "connection", f"{self.max_connections} connections are open")
            return
        self._expect_headers()

    def _expect_headers(self) -> None:
        """From now on they must come; between two requests keep-alive's time holds."""
        self._in_headers = True
        if self._headers_timer is None:
            self._headers_timer = self.loop.call_later(self.headers_timeout_s, self._headers_late)

    def _headers_late(self) -> None:
        self._headers_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            # Of a request behind one that is still answered: it gets a new time, and the first
            # keeps its answer.
            self._expect_headers()
            return
        late = f"did not come within {self.headers_timeout_s:g} s"
        self._refuse(408, "headers", late)

    def _refuse(self, status: int, param: str, message: str) -> None:
        """Answers where there is no request yet, and closes."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # an answer is under way: no other may stand in it
            return
        body = error_body(HttpError(status, param, message))
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%s" % (status, _REASONS[status], len(body), body)
        )
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        answered = self.cycle is None or self.cycle.response_complete
        if self._in_headers and answered and not self.transport.is_closing():
            # Any byte ends keep-alive's time, also one that begins no request.
            self._expect_headers()
        # What came with the last of the headers is not theirs.
        if self._in_headers and self._header_bytes > MAX_HEADER_BYTES:
            self._too_large()

    def _too_large(self) -> None:
        over = f"more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"
        self._refuse(431, "headers", over)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "request", "is not a request of HTTP/1.1")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()
        cast(dict[str, Any], self.scope)[SCOPE_KEY] = self

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS:
            self._too_large()
            raise httptools.HttpParserError("headers are too large")
        self._in_headers = False
        self._cancel_headers_timer()
        super().on_headers_complete()
        if not self.pipeline:
            self._expect_body()

    def on_response_complete(self) -> None:
        queued = bool(self.pipeline)
        super().on_response_complete()
        # Nothing is read for a request behind others: its body's time begins when they are done.
        if queued and not self.pipeline and self.cycle.more_body:
            self._expect_body()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._cancel_body_timer()
        # The next byte, if any, begins another request.
        self._in_headers, self._header_bytes = True, 0

    def _cancel_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _cancel_body_timer(self) -> None:
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _expect_body(self) -> None:
        """From now on the rest of it must come."""
        self._cancel_body_timer()
        self._body_timer = self.loop.call_later(self.unread_body_timeout_s, self._body_late)

    def _body_late(self) -> None:
        self._body_timer = None
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.stall_timeout_s, self._stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stall_timer()

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _stalled(self) -> None:
        self._stall_timer = None
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._cancel_headers_timer()
        self._cancel_stall_timer()
        self._cancel_body_timer()
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()
