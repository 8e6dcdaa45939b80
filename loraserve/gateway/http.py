"""One HTTP request as the endpoints see it, over plain ASGI."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

from loraserve.gateway.openai_errors import HttpError
from loraserve.gateway.record import RequestRecord
from loraserve.gateway.schema import Schema, parse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]

BODY_TIMEOUT_S = 30.0
# Longer bodies are checked in a thread, so that the streams of others go on. Reading the JSON lets
# no other thread run, some 10 ms a megabyte: the limit of a body bounds that.
_INLINE_BYTES = 128 << 10
JSON = b"application/json"
# Of a body that is refused for its size.
_DISCARD_BYTES = 64 << 20
_DISCARD_TIMEOUT_S = 5.0


class ClientGoneError(Exception):
    """The client closed the connection before its request was there."""


class _TooLongError(Exception):
    """More came than may."""


class Request:
    """`send_*` are called once; `started` says that the status is out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        self.record = record
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._receive = receive
        self._send = send
        self.started = False
        self.body_bytes = 0
        """Of the body that `json` has read."""

    def header(self, name: bytes) -> list[bytes]:
        """Every value of it; `name` in lower case."""
        return [value for key, value in self._headers if key == name]

    def parameters(self) -> dict[str, str]:
        return dict(parse_qsl(self.query.decode("latin-1"), max_num_fields=32))

    async def body(self, limit: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
        """Raises HttpError where it is too long or too slow, ClientGoneError."""
        for value in self.header(b"content-length"):
            if value.isdigit() and int(value[:20]) > limit:
                if not self.header(b"expect"):  # else it waits for our word
                    await self._discard()
                raise _too_long(limit)
        try:
            return await asyncio.wait_for(self._read(limit), timeout_s)
        except _TooLongError:
            await self._discard()
            raise _too_long(limit) from None
        except (TimeoutError, asyncio.TimeoutError):
            raise HttpError(
                408,
                "body",
                f"did not come within {timeout_s:g} s",
                headers=((b"connection", b"close"),),
            ) from None

    async def _read(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise _TooLongError
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _discard(self) -> None:
        """Reads what comes of a body that is not wanted, within bounds: a connection that is closed
        with data unread is reset, and takes the answer with it. Raises ClientGoneError."""

        async def read() -> None:
            left = _DISCARD_BYTES
            while left > 0:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), _DISCARD_TIMEOUT_S)

    async def json(self, schema: Schema, limit: int) -> dict[str, Any]:
        """The checked body. Raises HttpError, InvalidArgumentError, ClientGoneError."""
        for value in self.header(b"content-type"):
            kind = value.split(b";")[0].strip().lower()
            if kind not in (JSON, b"text/json") and not kind.endswith(b"+json"):
                raise HttpError(415, "Content-Type", "must be application/json")
        data = await self.body(limit)
        self.body_bytes = len(data)
        if data and not self.header(b"content-type"):
            # A page of another site can send a body without one, unasked.
            raise HttpError(415, "Content-Type", "is missing; it must be application/json")
        if len(data) <= _INLINE_BYTES:
            return parse(data, schema)
        return await asyncio.to_thread(parse, data, schema)

    async def send_bytes(
        self, body: bytes, status: int = 200, content_type: bytes = JSON, headers: Headers = ()
    ) -> None:
        self.started = True
        self.record.status = status
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"content-type", content_type),
                    (b"content-length", b"%d" % len(body)),
                    (b"x-request-id", self.record.id.encode()),
                    *headers,
                ],
            }
        )
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def send_json(self, value: Any, status: int = 200, headers: Headers = ()) -> None:
        await self.send_bytes(json.dumps(value).encode(), status, JSON, headers)

    async def start_events(self, headers: Headers = ()) -> None:
        """Begins a stream of server-sent events."""
        self.started = True
        self.record.status = 200
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                    (b"x-request-id", self.record.id.encode()),
                    *headers,
                ],
            }
        )

    async def send_part(self, body: bytes, *, last: bool = False) -> None:
        """Returns when the client's connection can take more."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})


def _too_long(limit: int) -> HttpError:
    return HttpError(
        413,
        "body",
        f"has more than the limit of {limit} bytes",
        headers=((b"connection", b"close"),),
    )
