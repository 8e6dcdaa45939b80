"""How a command reaches the cluster: options, environment, and the client made of them."""

import argparse
import functools
import os
from pathlib import Path

from loraserve.client import Client
from loraserve.errors import InvalidArgumentError
from loraserve.named_files import read_key
from loraserve.security import TlsFiles

DEFAULT_CONTROLLER = "127.0.0.1:7400"


def add_connection(parser: argparse.ArgumentParser, *, nodes: bool = False) -> None:
    """`nodes`: the command also works on nodes that serve without a controller."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--controller",
        metavar="HOST:PORT",
        help=f"of the cluster (default: $LORASERVE_CONTROLLER, or {DEFAULT_CONTROLLER})",
    )
    if nodes:
        group.add_argument(
            "--node",
            metavar="HOST:PORT",
            action="append",
            default=[],
            help="a node that serves without a controller; may be given more than once",
        )
    add = functools.partial(group.add_argument, type=Path, metavar="FILE")
    add("--api-key-file", help="with the key (default: the key in $LORASERVE_API_KEY, or none)")
    add("--tls-ca", help="PEM, authority of the servers' certificates (default: no TLS)")
    add("--tls-cert", help="PEM, certificate of this client")
    add("--tls-key", help="PEM, key of --tls-cert")


def connect(arguments: argparse.Namespace) -> Client:
    """Raises InvalidArgumentError; connects when first used."""
    tls = None
    if arguments.tls_ca or arguments.tls_cert or arguments.tls_key:
        tls = TlsFiles(arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    key = read_key("api-key-file", arguments.api_key_file)
    if key is None:
        key = os.environ.get("LORASERVE_API_KEY") or None
    nodes = getattr(arguments, "node", [])
    if nodes:
        if arguments.controller:
            raise InvalidArgumentError("node", "excludes --controller")
        return Client(nodes=nodes, api_key=key, tls=tls)
    controller = (
        arguments.controller or os.environ.get("LORASERVE_CONTROLLER") or DEFAULT_CONTROLLER
    )
    return Client(controller, api_key=key, tls=tls)
