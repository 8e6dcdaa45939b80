"""loraserve-node: reads the command line, runs one node until SIGTERM or SIGINT."""

import argparse
import logging
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from loraserve.daemon import DaemonParser, run_daemon
from loraserve.errors import InvalidArgumentError
from loraserve.logs import add_log_arguments
from loraserve.node.limits import Limits
from loraserve.node.model import ModelOptions, device_of, open_model, read_adapter
from loraserve.node.peers.arguments import add_peer_arguments, peer_options
from loraserve.node.pool.arguments import (
    add_pool_arguments,
    check_pool_arguments,
    pool_options,
)
from loraserve.node.server import NodeOptions, NodeServer
from loraserve.security import TlsFiles
from loraserve.tracing import open_tracer

_log = logging.getLogger("loraserve.node")

# Of the top level of a configuration file; its adapters are the controller's to place.
_SHARED = {
    **{name: name for name in ("model", "base", "device", "threads", "keys")},
    **{name: name for name in ("log-level", "log-format", "otlp-endpoint")},
    **{
        name: name
        for name in ("drain-timeout-s", "max-num-seqs", "max-num-batched-tokens", "dtype")
    },
}


def _adapter(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path)


def _parser() -> argparse.ArgumentParser:
    parser = DaemonParser(
        prog="loraserve-node",
        description="Serves one base model and the LoRA adapters that the controller places here.",
        section="node",
        shared=_SHARED,
    )
    add = parser.add_argument
    limits = Limits()
    add("--model", type=Path, required=True, help="Hugging Face directory")
    add("--base", default="", help="name of the base model (default: the directory's)")
    add("--listen", default="127.0.0.1:7410", help="host:port; port 0 takes a free one")
    add("--advertise", help="host:port where clients reach this node (default: --listen)")
    add("--port-file", type=Path, help="file that gets the bound address once the node is ready")
    add("--node-id", help="the same over restarts (default: from host name and port)")
    add("--controller", help="host:port; without one the node serves alone")
    add("--controller-key", type=Path, help="file with the key (role node) for the controller")
    add("--store", help="path or fsspec URL of the packed adapters, where this node reaches it")
    add("--adapter", type=_adapter, action="append", default=[], metavar="NAME=PATH")
    add("--keys", type=Path, help="key file; without one only loopback is served")
    add("--tls-cert", type=Path, help="PEM certificate of this node, also towards the controller")
    add("--tls-key", type=Path, help="PEM key of --tls-cert")
    add("--tls-client-ca", type=Path, help="demand client certificates of this authority (PEM)")
    add("--tls-ca", type=Path, help="authority of the controller's certificate (PEM)")
    add("--metrics-listen", help="loopback host:port of /metrics; port 0 takes a free one")
    add("--metrics-port-file", type=Path, help="file that gets the bound address of /metrics")
    add("--failure-domain", help="nodes that fail together share this word (default: host name)")
    add("--relative-speed", type=float, default=1.0, help="of the engine, for placement")
    add("--device", default="cpu", help="cpu or cuda")
    add("--weight-dtype", "--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--threads", type=int, default=0, help="of the engine; 0: one for each core")
    add("--memory-bytes", type=int, default=0, help="KV cache and adapters in use; 0: 1 GiB")
    add_pool_arguments(parser)
    add_peer_arguments(parser)
    add(
        *("--max-sequences", "--max-num-seqs"),
        type=int,
        default=limits.max_sequences,
        help="requests in one engine step",
    )
    add(
        *("--max-batch-tokens", "--max-num-batched-tokens"),
        type=int,
        default=512,
        help="in one engine step",
    )
    add("--max-queued-requests", type=int, default=limits.max_queued_requests)
    add("--max-prompt-bytes", type=int, default=limits.max_prompt_bytes)
    add(
        "--stall-timeout-s",
        type=float,
        default=limits.stall_timeout_s,
        help="a request ends whose client reads nothing for so long",
    )
    add("--drain-timeout-s", type=float, default=30.0, help="for requests that run at the end")
    add("--end-with", type=int, metavar="PID", help="stop when this process, the parent, has gone")
    add("--otlp-endpoint", metavar="URL", help="OTLP/HTTP collector that gets traces")
    add_log_arguments(parser)
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Ranges that argparse does not know. Exits like argparse."""
    for name, lowest in (
        ("threads", 0),
        ("memory_bytes", 0),
        ("max_sequences", 1),
        ("max_batch_tokens", 1),
        ("max_queued_requests", 0),
        ("max_prompt_bytes", 1),
        ("drain_timeout_s", 0),
        ("stall_timeout_s", 0.001),
    ):
        if not getattr(arguments, name) >= lowest:
            _parser().error(f"--{name.replace('_', '-')}: at least {lowest}")
    check_pool_arguments(arguments, _parser().error)
    if not 0.001 <= arguments.relative_speed <= 1000:
        _parser().error("--relative-speed: from 0.001 to 1000")
    if not arguments.controller and (arguments.controller_key or arguments.tls_ca):
        _parser().error("--controller-key and --tls-ca go with --controller")
    names = [name for name, _ in arguments.adapter]
    if len(set(names)) != len(names):
        _parser().error("--adapter: a name is given twice")
    if arguments.metrics_port_file and not arguments.metrics_listen:
        _parser().error("--metrics-port-file goes with --metrics-listen")


def _key(field: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(field, f"{path}: cannot be read: {error}") from None
    if not re.fullmatch(r"\S{1,256}", key):
        raise InvalidArgumentError(field, f"{path}: does not hold one key")
    return key


def _default_id(listen: str) -> str:
    host = re.sub(r"[^a-z0-9-]", "-", platform.node().lower()).strip("-") or "node"
    port = listen.rpartition(":")[2]
    # A free port is another one at every start; the id must not be.
    return f"{host[:40]}-{port}" if port != "0" else f"{host[:40]}-{os.getpid()}"


def _model_options(arguments: argparse.Namespace) -> ModelOptions:
    return ModelOptions(
        path=arguments.model,
        base=arguments.base,
        device=arguments.device,
        weight_dtype=arguments.weight_dtype,
        memory_bytes=arguments.memory_bytes,
        max_sequences=arguments.max_sequences,
        max_batch_tokens=arguments.max_batch_tokens,
        threads=arguments.threads,
        failure_domain=arguments.failure_domain,
    )


def _options(arguments: argparse.Namespace, model: ModelOptions) -> NodeOptions:
    tls = controller_tls = None
    if arguments.tls_cert or arguments.tls_key or arguments.tls_client_ca:
        tls = TlsFiles(arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)
    if arguments.tls_ca:
        controller_tls = TlsFiles(arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    controller_key = _key("controller-key", arguments.controller_key)
    peer_key = _key("peer-key", arguments.peer_key) or controller_key
    return NodeOptions(
        node_id=arguments.node_id or _default_id(arguments.listen),
        base=model.base_name,
        listen=arguments.listen,
        advertise=arguments.advertise,
        controller=arguments.controller,
        controller_key=controller_key,
        controller_tls=controller_tls,
        store=arguments.store,
        keys=arguments.keys,
        tls=tls,
        metrics_listen=arguments.metrics_listen,
        limits=Limits(
            max_sequences=arguments.max_sequences,
            max_queued_requests=arguments.max_queued_requests,
            max_prompt_bytes=arguments.max_prompt_bytes,
            stall_timeout_s=arguments.stall_timeout_s,
        ),
        pool=pool_options(arguments),
        peers=peer_options(arguments, peer_key),
        drain_timeout_s=arguments.drain_timeout_s,
        devices=(device_of(model),),
        relative_speed=arguments.relative_speed,
        adapters=dict(arguments.adapter),
        tracer=open_tracer(arguments.otlp_endpoint, "loraserve-node"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 after a signal, 2 where it cannot start (one line on stderr says why)."""
    arguments = _parser().parse_args(argv)
    _check(arguments)

    def make() -> NodeServer:
        model = _model_options(arguments)
        options = _options(arguments, model)
        return NodeServer(options, lambda: open_model(model), read_adapter)

    return run_daemon("loraserve-node", arguments, _log, make)


if __name__ == "__main__":
    sys.exit(main())
