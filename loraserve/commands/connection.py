"""How a command reaches the cluster: options, environment, and the client made of them."""

import argparse
import os
from pathlib import Path

from loraserve.client import Client
from loraserve.errors import InvalidArgumentError
from loraserve.security import TlsFiles

DEFAULT_CONTROLLER = "127.0.0.1:7400"


def add_connection(parser: argparse.ArgumentParser, *, nodes: bool = False) -> None:
    """`nodes`: the command also works on nodes that serve without a controller."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--controller",
        metavar="HOST:PORT",
        help=f"default: $LORASERVE_CONTROLLER, or {DEFAULT_CONTROLLER}",
    )
    if nodes:
        group.add_argument(
            "--node",
            metavar="HOST:PORT",
            action="append",
            default=[],
            help="a node that serves without a controller; may be given more than once",
        )
    group.add_argument(
        "--api-key-file", type=Path, help="file with the key (default: $LORASERVE_API_KEY, or none)"
    )
    group.add_argument("--tls-ca", type=Path, help="authority of the servers' certificates (PEM)")
    group.add_argument("--tls-cert", type=Path, help="PEM certificate of this client")
    group.add_argument("--tls-key", type=Path, help="PEM key of --tls-cert")


def _api_key(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get("LORASERVE_API_KEY") or None
    try:
        key = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError("api-key-file", f"{path}: cannot be read: {error}") from None
    if not key or not key.isprintable() or " " in key:
        raise InvalidArgumentError("api-key-file", f"{path}: does not hold one key")
    return key


def connect(arguments: argparse.Namespace) -> Client:
    """Raises InvalidArgumentError; connects when first used."""
    tls = None
    if arguments.tls_ca or arguments.tls_cert or arguments.tls_key:
        tls = TlsFiles(arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    key = _api_key(arguments.api_key_file)
    nodes = getattr(arguments, "node", [])
    if nodes:
        if arguments.controller:
            raise InvalidArgumentError("node", "excludes --controller")
        return Client(nodes=nodes, api_key=key, tls=tls)
    controller = (
        arguments.controller or os.environ.get("LORASERVE_CONTROLLER") or DEFAULT_CONTROLLER
    )
    return Client(controller, api_key=key, tls=tls)
