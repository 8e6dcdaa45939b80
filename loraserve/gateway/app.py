"""The ASGI application: paths to endpoints, errors to answers."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from loraserve.errors import LoraServeError, UnavailableError
from loraserve.gateway.access import ACCESS, Caller, Gate
from loraserve.gateway.adapters import AdapterRoots, LoadAdapter, UnloadAdapter
from loraserve.gateway.chat import ChatCompletions
from loraserve.gateway.completions import Completions
from loraserve.gateway.connection import SCOPE_KEY
from loraserve.gateway.frames import DONE, event_of
from loraserve.gateway.http import ClientGoneError, Receive, Request, Scope, Send
from loraserve.gateway.models import table_of
from loraserve.gateway.openai_errors import (
    HttpError,
    error_body,
    error_object,
    retry_headers,
    status_of,
)
from loraserve.gateway.openapi import document_text
from loraserve.gateway.record import RequestRecord
from loraserve.gateway.site import GatewaySite
from loraserve.gateway.tokens import Detokenize, Tokenize

_log = logging.getLogger(__name__)

Endpoint = Callable[[Request, Caller], Awaitable[None]]
_MODELS = "/v1/models/"
_ENDED = UnavailableError("server", "is stopping, and the time for requests that run has passed")
# For telling that to a client.
_LAST_WORD_S = 1.0
# What metrics name; strangers cannot make series.
_PATHS = frozenset(path for _, path in ACCESS)
# Traced and logged.
_GENERATING = frozenset({"/v1/completions", "/v1/chat/completions"})


class GatewayApp:
    """One gateway's HTTP interface. Lives on one event loop."""

    def __init__(self, site: GatewaySite, gate: Gate, roots: AdapterRoots) -> None:
        self._site = site
        self._gate = gate
        self._endpoints: dict[tuple[str, str], Endpoint] = {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("POST", "/ping"): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/version"): self._version,
            ("GET", "/v1/models"): self._models,
            ("GET", _MODELS): self._model,
            ("POST", "/v1/completions"): Completions(site),
            ("POST", "/v1/chat/completions"): ChatCompletions(site),
            ("POST", "/tokenize"): Tokenize(site),
            ("POST", "/detokenize"): Detokenize(site),
            ("POST", "/v1/load_lora_adapter"): LoadAdapter(site, roots),
            ("POST", "/v1/unload_lora_adapter"): UnloadAdapter(site),
            ("GET", "/metrics"): self._metrics,
            ("GET", "/openapi.json"): self._openapi,
        }
        self._document = document_text().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"an ASGI server of HTTP is needed, not of {scope['type']}")
        path = scope["path"] if scope["path"] in _PATHS else "other"
        record = RequestRecord(self._site.metrics, path, generates=path in _GENERATING)
        request = Request(scope, receive, send, record)
        tracer = self._site.tracer
        if tracer is not None and path in _GENERATING:
            parents = request.header(b"traceparent")
            parent = parents[0].decode("latin-1") if len(parents) == 1 else ""
            about = {"http.request.method": request.method, "http.route": path}
            record.span = tracer.serve(f"{request.method} {path}", parent, about)
        connection = scope.get(SCOPE_KEY)
        task = asyncio.current_task()
        if connection is not None and task is not None:
            connection.on_lost = task.cancel
        try:
            await self._answer(request)
        except asyncio.CancelledError:
            # Its client has gone, and all that it held with it; else the server ends.
            if connection is None or not connection.lost:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._fail(request, _ENDED), _LAST_WORD_S)
        finally:
            if connection is not None:
                connection.on_lost = None
            record.end()

    async def _answer(self, request: Request) -> None:
        try:
            endpoint, roles = self._endpoint(request)
            caller = self._gate.admit(request, roles)
            request.record.caller = f"{caller.identity.tenant}/{caller.identity.name}"
            self._site.sessions.began(caller)
            try:
                await endpoint(request, caller)
            finally:
                self._site.sessions.ended(caller)
        except ClientGoneError:
            return
        except LoraServeError as error:
            await self._fail(request, error)
        except HttpError as error:
            request.record.refused(error.param)
            await request.send_bytes(error_body(error), error.status, headers=error.headers)
        except Exception:
            _log.exception("unexpected error in a request")
            internal = LoraServeError("server", "internal error; the server's log says more")
            await self._fail(request, internal)

    def _endpoint(self, request: Request) -> tuple[Endpoint, Any]:
        """Raises HttpError."""
        method = "GET" if request.method == "HEAD" else request.method
        path = request.path
        if path.startswith(_MODELS) and len(path) > len(_MODELS):
            path = _MODELS
        endpoint = self._endpoints.get((method, path))
        if endpoint is not None:
            return endpoint, ACCESS[method, path]
        allowed = sorted(m for m, p in self._endpoints if p == path)
        if allowed:
            allow = ", ".join(allowed).encode()
            headers = ((b"allow", allow),)
            raise HttpError(405, "method", f"{path} takes {', '.join(allowed)}", headers=headers)
        raise HttpError(404, "path", f"there is no {path[:200]!r} here")

    async def _fail(self, request: Request, error: LoraServeError) -> None:
        request.record.failed(error)
        if not request.started:
            headers = retry_headers(error)
            await request.send_bytes(error_body(error), status_of(error), headers=headers)
            return
        # The status is out: the error is an event of the stream, and the last one.
        with contextlib.suppress(RuntimeError):
            await request.send_part(event_of({"error": error_object(error)}))
            await request.send_part(DONE, last=True)

    # Endpoints

    async def _health(self, request: Request, caller: Caller) -> None:
        await request.send_bytes(b"", content_type=b"text/plain")

    async def _ready(self, request: Request, caller: Caller) -> None:
        reason = self._site.not_ready()
        status = 200 if reason is None else 503
        await request.send_json({"ready": reason is None, "reason": reason}, status)

    async def _version(self, request: Request, caller: Caller) -> None:
        await request.send_json({"version": version("loraserve")})

    async def _metrics(self, request: Request, caller: Caller) -> None:
        text = self._site.metrics.text()
        await request.send_bytes(text, content_type=CONTENT_TYPE_LATEST.encode())

    async def _openapi(self, request: Request, caller: Caller) -> None:
        await request.send_bytes(self._document)

    async def _models(self, request: Request, caller: Caller) -> None:
        table = await table_of(self._site.sessions.of(caller))
        await request.send_json(self._site.names.list(table))

    async def _model(self, request: Request, caller: Caller) -> None:
        table = await table_of(self._site.sessions.of(caller))
        await request.send_json(self._site.names.find(request.path[len(_MODELS) :], table))
