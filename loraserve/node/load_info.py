"""What a node is told of an adapter that it is to load."""

from dataclasses import dataclass
from typing import NamedTuple

from loraserve.placement.types import AdapterSpec


class Peer(NamedTuple):
    """Another node that holds the revision, and the address (host:port) of its PeerService."""

    node_id: str
    address: str


@dataclass(frozen=True)
class AdapterLoadInfo:
    """Size and rank of `spec` are 0 where nobody told them. `peers`, best first, are a hint: they
    may have dropped their copies since."""

    spec: AdapterSpec
    peers: tuple[Peer, ...] = ()
