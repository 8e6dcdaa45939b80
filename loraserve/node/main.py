"""loraserve-node: reads the command line, runs one node until SIGTERM or SIGINT."""

import argparse
import functools
import logging
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from loraserve.command_line import number
from loraserve.daemon import DaemonParser, run_daemon
from loraserve.logs import add_log_arguments
from loraserve.named_files import read_key
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


_AT = "HOST:PORT"


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
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory")
    add("--base", default="", help="name of the base model (default: the directory's)")
    add("--listen", default="127.0.0.1:7410", metavar=_AT, help="port 0 takes a free one")
    add("--advertise", metavar=_AT, help="where clients reach this node (default: --listen)")
    file = functools.partial(add, type=Path, metavar="FILE")
    file("--port-file", help="gets the bound address once the node is ready")
    add("--node-id", metavar="NAME", help="the same over restarts (default: of host and port)")
    add("--controller", metavar=_AT, help="without one the node serves alone")
    file("--controller-key", help="with the key (role node) for the controller")
    add(
        "--store",
        metavar="PATH_OR_URL",
        help="of the packed adapters: that of the controller, as this node reaches it; without "
        "one they come over the controller",
    )
    add(
        "--adapter",
        type=_adapter,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="PEFT directory or packed file to load at start; may be given repeatedly",
    )
    file("--keys", help="key file; without one only loopback is served")
    file("--tls-cert", help="PEM, certificate of this node, also towards the controller")
    file("--tls-key", help="PEM, key of --tls-cert")
    file("--tls-client-ca", help="PEM, authority of the client certificates that are demanded")
    file("--tls-ca", help="PEM, authority of the controller's certificate")
    add("--metrics-listen", metavar=_AT, help="loopback, of /metrics; port 0 takes a free one")
    file("--metrics-port-file", help="gets the bound address of /metrics")
    add(
        "--failure-domain",
        metavar="WORD",
        help="shared by nodes that fail together (default: the host's name)",
    )
    add(
        "--relative-speed",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="of the engine, for placement",
    )
    add("--device", default="cpu", help="cpu or cuda")
    add(
        *("--weight-dtype", "--dtype"),
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="that weights are kept in; auto: as in the files",
    )
    add(
        "--activation-dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="that base products read; bfloat16 on cpu rounds, and is faster with AVX512-BF16; "
        "the same for all nodes of a cluster (auto: float32 on cpu, bfloat16 on cuda)",
    )
    number(add, "--threads", 0, "THREADS", "of the engine; 0: one for each core")
    number(add, "--memory-bytes", 0, "BYTES", "of KV cache and adapters in use; 0: 1 GiB")
    add_pool_arguments(parser)
    add_peer_arguments(parser)
    add(
        *("--max-sequences", "--max-num-seqs"),
        type=int,
        default=limits.max_sequences,
        metavar="REQUESTS",
        help="in one engine step",
    )
    add(
        *("--max-batch-tokens", "--max-num-batched-tokens"),
        type=int,
        default=512,
        metavar="TOKENS",
        help="in one engine step",
    )
    queued, prompt = limits.max_queued_requests, limits.max_prompt_bytes
    number(add, "--max-queued-requests", queued, "REQUESTS", "that wait here; more are refused")
    number(add, "--max-prompt-bytes", prompt, "BYTES", "of one request's text")
    stall = limits.stall_timeout_s
    number(add, "--stall-timeout-s", stall, "SECONDS", "in which a client must read something")
    number(add, "--drain-timeout-s", 30.0, "SECONDS", "for requests that run at the end")
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
        activation_dtype=arguments.activation_dtype,
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
    controller_key = read_key("controller-key", arguments.controller_key)
    peer_key = read_key("peer-key", arguments.peer_key) or controller_key
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


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked by themselves. Exits like argparse where they cannot work."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 after a signal, 2 where it cannot start (one line on stderr says why)."""
    arguments = parse_arguments(argv)

    def make() -> NodeServer:
        model = _model_options(arguments)
        options = _options(arguments, model)
        return NodeServer(options, lambda: open_model(model), read_adapter)

    return run_daemon("loraserve-node", arguments, _log, make)


if __name__ == "__main__":
    sys.exit(main())
