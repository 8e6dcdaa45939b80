"""The peers' part of the node's command line."""

import argparse
from pathlib import Path

from loraserve.node.peers.peering import AUTO, TRANSFER_MODES, PeerOptions
from loraserve.security import TlsFiles


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--transfer",
        default=AUTO,
        choices=TRANSFER_MODES,
        help="how adapters are read from other nodes: auto reads one-sided by UCX where both ends "
        "can and streams over gRPC elsewhere, off always streams, ucx does not start without UCX",
    )
    add(
        "--gpudirect",
        default="off",
        choices=("off", "on"),
        help="one-sided reads land in the GPU's memory; on does not start unless a dry run proves "
        "that they can (loraserve node doctor --gpudirect)",
    )
    add(
        "--peer-key",
        type=Path,
        metavar="FILE",
        help="with the key (role node) for other nodes (default: --controller-key)",
    )


def peer_options(arguments: argparse.Namespace, key: str | None) -> PeerOptions:
    """`key`: for other nodes. They serve TLS where this one does."""
    tls = None
    if arguments.tls_cert:
        authority = arguments.tls_ca or arguments.tls_client_ca
        tls = TlsFiles(arguments.tls_cert, arguments.tls_key, authority)
    gpudirect = arguments.gpudirect == "on"
    return PeerOptions(arguments.transfer, key, tls, arguments.device if gpudirect else None)
