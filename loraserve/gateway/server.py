"""The gateway's parts put together: sessions with the cluster, the application, uvicorn."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from loraserve.checkpoint.model_config import read_model_config
from loraserve.errors import InvalidArgumentError, LoraServeError, UnavailableError
from loraserve.gateway.access import Gate
from loraserve.gateway.adapters import AdapterRoots
from loraserve.gateway.app import GatewayApp
from loraserve.gateway.connection import BoundedConnection
from loraserve.gateway.metrics import GatewayMetrics
from loraserve.gateway.models import ModelNames
from loraserve.gateway.sessions import Sessions
from loraserve.gateway.site import MAX_BODY_BYTES, GatewaySite
from loraserve.named_files import named, wrong
from loraserve.security import TlsFiles, server_credentials
from loraserve.serving import MetricsServer, serve_metrics
from loraserve.text.chat_template import ChatTemplate
from loraserve.text.tokenizer import Tokenizer
from loraserve.tracing import Tracer
from loraserve.wire import split_address

_log = logging.getLogger(__name__)

_BACKLOG = 2048
_CUT_OFF_S = 2.0


@dataclass(frozen=True)
class GatewayOptions:
    """`listen` is host:port, port 0 for a free one. Exactly one of `controller` and `nodes`."""

    listen: str
    controller: str | None = None
    nodes: tuple[str, ...] = ()
    key: str | None = None
    """Of the gateway itself, to watch routes with; of a cluster with keys."""
    keys: Path | None = None
    cluster_tls: TlsFiles | None = None
    tls: TlsFiles | None = None
    tokenizer: Path | None = None
    chat_template: Path | None = None
    adapter_roots: tuple[Path, ...] = ()
    allow_base_mismatch: bool = False
    base: str = ""
    aliases: tuple[str, ...] = ()
    metrics_listen: str | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    drain_timeout_s: float = 30.0
    tracer: Tracer | None = None
    """Closed with the gateway."""


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are the daemon's


def _read_template(options: GatewayOptions, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """Raises InvalidArgumentError, InvalidCheckpointError."""
    path = options.chat_template
    if path is None:
        if tokenizer is None or options.tokenizer is None:
            return None
        with named("tokenizer", options.tokenizer):
            return ChatTemplate.of_tokenizer(tokenizer)
    with named("chat-template", path):
        source = path.read_text("utf-8")
        return ChatTemplate(source, tokenizer.special_tokens if tokenizer else {})


def _read_tokenizer(path: Path | None) -> Tokenizer | None:
    """Raises InvalidArgumentError, InvalidCheckpointError."""
    if path is None:
        return None
    if not path.is_dir():
        raise wrong("tokenizer", path, "is no directory")
    with named("tokenizer", path):
        return Tokenizer.from_directory(path)


def _context(model: Path | None) -> int | None:
    """Tokens of the model's context, where its configuration is beside the tokenizer."""
    if model is None or not (model / "config.json").is_file():
        return None
    with named("tokenizer", model):
        return read_model_config(model).max_position


def _bind(address: str) -> socket.socket:
    """Raises UnavailableError."""
    host, port = split_address(address, "listen")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise UnavailableError(
            "listen", f"cannot bind {address}: {error.strerror or error}"
        ) from None
    return bound


class GatewayServer:
    """One gateway. `start`, then `stop`; both once."""

    def __init__(self, options: GatewayOptions) -> None:
        """Raises LoraServeError for options that cannot work; nothing listens yet."""
        if (options.controller is None) == (not options.nodes):
            raise InvalidArgumentError("controller", "exactly one of --controller and --node")
        self._options = options
        self._gate = Gate(options.listen, options.keys, options.tls)
        if options.tls is not None:
            server_credentials(options.tls)  # raises what is wrong with them, as uvicorn would not
        tokenizer = _read_tokenizer(options.tokenizer)
        roots = AdapterRoots(options.adapter_roots)
        self._site = GatewaySite(
            Sessions(
                options.controller,
                options.nodes,
                options.cluster_tls,
                own_key=options.key,
                tokenizer=tokenizer,
            ),
            ModelNames(options.base, options.aliases, one_base=tokenizer is not None),
            tokenizer,
            _read_template(options, tokenizer),
            GatewayMetrics(),
            context_tokens=_context(options.tokenizer),
            model_directory=options.tokenizer,
            allow_base_mismatch=options.allow_base_mismatch,
            max_body_bytes=options.max_body_bytes,
            tracer=options.tracer,
        )
        self._app = GatewayApp(self._site, self._gate, roots)
        self._metrics_server: MetricsServer | None = None
        self._uvicorn: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self.address = ""
        self.metrics_address = ""

    async def start(self) -> None:
        """Listens and serves. Raises UnavailableError; then `stop` is still to be called."""
        options = self._options
        bound = _bind(options.listen)
        host, port = bound.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        tls = options.tls
        config = uvicorn.Config(
            self._app,
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(options.drain_timeout_s)),
            ssl_certfile=str(tls.cert) if tls and tls.cert else None,
            ssl_keyfile=str(tls.key) if tls and tls.key else None,
        )
        self._uvicorn = _Uvicorn(config)
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[bound]))
        state = self._uvicorn.server_state
        self._site.observe(lambda: len(state.connections))
        if options.metrics_listen:
            metrics = self._site.metrics.registry
            self._metrics_server = serve_metrics(options.metrics_listen, metrics)
            self.metrics_address = self._metrics_server.address
        await self._site.first_routes(_log)
        while not self._uvicorn.started:
            if self._serving.done():
                self._serving.result()
                raise LoraServeError("listen", "the HTTP server ended at its start")
            await asyncio.sleep(0.01)
        _log.info("serving on http%s://%s", "s" if tls else "", self.address)

    async def stop(self) -> None:
        """Takes no new connections, lets requests end within the drain timeout, closes."""
        self._site.draining = True
        if self._uvicorn is not None and self._serving is not None:
            self._uvicorn.should_exit = True
            await asyncio.gather(self._serving, return_exceptions=True)
            # What was cut off at the drain timeout still tells its client so.
            if cut_off := set(self._uvicorn.server_state.tasks):
                await asyncio.wait(cut_off, timeout=_CUT_OFF_S)
        await self._site.sessions.close()
        if self._metrics_server is not None:
            self._metrics_server.close()
        if self._options.tracer is not None:
            await asyncio.to_thread(self._options.tracer.close)
