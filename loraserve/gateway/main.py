"""loraserve-gateway: reads the command line, runs one gateway until SIGTERM or SIGINT."""

import argparse
import asyncio
import functools
import logging
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from loraserve.daemon import DaemonParser, run_daemon
from loraserve.gateway.server import GatewayOptions, GatewayServer
from loraserve.gateway.site import MAX_BODY_BYTES
from loraserve.logs import add_log_arguments
from loraserve.named_files import read_key
from loraserve.security import TlsFiles
from loraserve.tracing import open_tracer

_log = logging.getLogger("loraserve.gateway")

# Of the top level of a configuration file.
_SHARED = {
    "model": "tokenizer",
    **{name: name for name in ("host", "port", "base", "served-model-name", "keys")},
    **{name: name for name in ("chat-template", "adapter-root", "allow-base-mismatch")},
    **{name: name for name in ("drain-timeout-s", "log-level", "log-format", "otlp-endpoint")},
}


_AT = "HOST:PORT"


def _parser() -> argparse.ArgumentParser:
    parser = DaemonParser(
        prog="loraserve-gateway",
        description="An OpenAI-compatible HTTP front of a cluster.",
        section="gateway",
        shared=_SHARED,
        rivals=frozenset({"listen", "host", "port"}),
    )
    add = parser.add_argument
    add("--listen", default="127.0.0.1:8000", metavar=_AT, help="port 0 takes a free one")
    add("--host", help="instead of --listen, with --port (default: 127.0.0.1)")
    add("--port", type=int, metavar="PORT", help="instead of --listen (default: 8000)")
    file = functools.partial(add, type=Path, metavar="FILE")
    file("--port-file", help="gets the bound address once it serves")
    add("--controller", metavar=_AT, help="of the cluster; it or --node is needed")
    add(
        "--node",
        action="append",
        default=[],
        metavar=_AT,
        help="of a node that serves alone; may be given repeatedly",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory of the base model, for its texts; without one chats and "
        "token texts are refused",
    )
    file("--chat-template", help="Jinja (default: what came with the tokenizer)")
    add(
        "--base",
        default="",
        metavar="NAME",
        help="of the base model, where there are several (default: the only one)",
    )
    add(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="another one of the base model; may be given repeatedly",
    )
    file("--keys", help="key file of the cluster; without one only loopback is served")
    file("--key-file", help="with the gateway's own key (role node), to see routes")
    add(
        "--adapter-root",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="under which POST /v1/load_lora_adapter may read; may be given repeatedly",
    )
    add("--allow-base-mismatch", action="store_true", help="load adapters made for other bases")
    file("--tls-cert", help="PEM, certificate of this server")
    file("--tls-key", help="PEM, key of --tls-cert")
    file("--tls-ca", help="PEM, authority of the cluster's certificates")
    add(
        "--max-body-bytes",
        type=int,
        default=MAX_BODY_BYTES,
        metavar="BYTES",
        help="of one HTTP request",
    )
    add(
        "--drain-timeout-s",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for requests that run at the end",
    )
    add("--metrics-listen", metavar=_AT, help="loopback, of /metrics; port 0 takes a free one")
    file("--metrics-port-file", help="gets the bound address of /metrics")
    add("--end-with", type=int, metavar="PID", help="stop when this process, the parent, has gone")
    add("--otlp-endpoint", metavar="URL", help="OTLP/HTTP collector that gets traces")
    add_log_arguments(parser)
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Ranges that argparse does not know. Exits like argparse."""
    if bool(arguments.controller) == bool(arguments.node):
        _parser().error("exactly one of --controller and --node is needed")
    if arguments.max_body_bytes < 1024:
        _parser().error("--max-body-bytes: at least 1024")
    if not 0 <= arguments.drain_timeout_s <= 86400:
        _parser().error("--drain-timeout-s: from 0 to 86400")
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        _parser().error("--tls-cert and --tls-key go together")
    if arguments.metrics_port_file and not arguments.metrics_listen:
        _parser().error("--metrics-port-file goes with --metrics-listen")


def _listen(arguments: argparse.Namespace) -> str:
    if arguments.host is None and arguments.port is None:
        return str(arguments.listen)
    host = arguments.host or "127.0.0.1"
    port = 8000 if arguments.port is None else arguments.port
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _options(arguments: argparse.Namespace) -> GatewayOptions:
    cert, key, ca = arguments.tls_cert, arguments.tls_key, arguments.tls_ca
    return GatewayOptions(
        listen=_listen(arguments),
        controller=arguments.controller,
        nodes=tuple(arguments.node),
        key=read_key("key-file", arguments.key_file),
        keys=arguments.keys,
        cluster_tls=TlsFiles(None, None, ca) if ca else None,
        tls=TlsFiles(cert, key) if cert else None,
        tokenizer=arguments.tokenizer,
        chat_template=arguments.chat_template,
        adapter_roots=tuple(arguments.adapter_root),
        allow_base_mismatch=arguments.allow_base_mismatch,
        base=arguments.base,
        aliases=tuple(arguments.served_model_name),
        metrics_listen=arguments.metrics_listen,
        max_body_bytes=arguments.max_body_bytes,
        drain_timeout_s=arguments.drain_timeout_s,
        tracer=open_tracer(arguments.otlp_endpoint, "loraserve-gateway"),
    )


def _run_loop() -> Callable[[Coroutine[Any, Any, None]], None]:
    """uvloop's where there is one (not on Windows): it halves what a token costs."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked by themselves. Exits like argparse where they cannot work."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 after a signal, 2 where it cannot start (one line on stderr says why)."""
    arguments = parse_arguments(argv)
    return run_daemon(
        "loraserve-gateway",
        arguments,
        _log,
        lambda: GatewayServer(_options(arguments)),
        _run_loop(),
    )


if __name__ == "__main__":
    sys.exit(main())
