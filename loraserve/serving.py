"""What every daemon serves beside its own RPCs: its health, and metrics for Prometheus."""

import threading
from collections.abc import Iterable
from typing import Any
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import (
    health,
    health_pb2,
)
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from loraserve.errors import InvalidArgumentError, UnavailableError
from loraserve.wire import is_loopback, split_address


class Health(health.aio.HealthServicer):  # type: ignore[misc]
    """Of a daemon and its services, which are all well or all not. Keeps nothing for a name that
    it does not know: Watch refuses it as Check does."""

    def __init__(self, services: Iterable[str]) -> None:
        super().__init__()
        self._names = ("", *services)

    async def tell(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in self._names:
            await self.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def Watch(self, request: Any, context: Any) -> None:
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        await super().Watch(request, context)


class MetricsServer:
    """A running /metrics endpoint; `address` is the one that was bound."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        host, port = server.server_address[:2]
        self.address = f"{host!s}:{port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(address: str, registry: CollectorRegistry) -> MetricsServer:
    """Serves /metrics by HTTP on loopback. Raises InvalidArgumentError, UnavailableError."""
    # They are a second series for each counter, that nobody reads.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    host, port = split_address(address, "metrics-listen")
    if not is_loopback(address):
        raise InvalidArgumentError(
            "metrics-listen", f"{address}: metrics carry no key and stay on loopback"
        )
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise UnavailableError("metrics-listen", f"cannot bind {address}: {error}") from None
    return MetricsServer(server, thread)
