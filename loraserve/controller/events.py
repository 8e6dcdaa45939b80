"""What the controller's core is told (events) and what it asks for (effects). Plain values."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from loraserve.placement.types import AdapterId, AdapterSpec


class Residency(enum.Enum):
    """The words and numbers of ResidencyState on the wire."""

    PENDING = 1
    FETCHING = 2
    DISK = 3
    HOST = 4
    DEVICE = 5
    DRAINING = 6
    FAILED = 7

    @property
    def serves(self) -> bool:
        """Whether a request that arrives now waits for no fetch."""
        return self in (Residency.HOST, Residency.DEVICE)


@dataclass(frozen=True)
class NodeRecord:
    """A node as it registered itself."""

    node_id: str
    incarnation: int
    address: str
    base: str
    base_digest: str
    adapter_memory_bytes: int
    max_rank: int = 0


@dataclass(frozen=True)
class Copy:
    """One revision on one node, as the node reports it. `error` says why, where it failed."""

    adapter: AdapterId
    revision: str
    state: Residency
    error: str = ""


@dataclass(frozen=True)
class DemandSample:
    """Tokens of one adapter since the node's heartbeat before."""

    adapter: AdapterId
    prefill_tokens: int
    decode_tokens: int


# Events


@dataclass(frozen=True)
class NodeRegistered:
    node: NodeRecord


@dataclass(frozen=True)
class Heartbeat:
    """`copies` is everything that the node holds; `generation` rises when that changes.
    `failed` are loads that ended in an error since the heartbeat before: (command id, why).
    `applied_command` is the highest command id whose effect `copies` show."""

    node_id: str
    incarnation: int
    generation: int
    copies: tuple[Copy, ...] = ()
    demand: tuple[DemandSample, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    draining: bool = False
    applied_command: int = 0


@dataclass(frozen=True)
class AdapterAdded:
    spec: AdapterSpec


@dataclass(frozen=True)
class AdapterUpdated:
    """The name points to another revision from now on."""

    spec: AdapterSpec


@dataclass(frozen=True)
class AdapterRemoved:
    adapter: AdapterId


@dataclass(frozen=True)
class Tick:
    """One heartbeat period has passed; the core's only sense of time."""


Event = NodeRegistered | Heartbeat | AdapterAdded | AdapterUpdated | AdapterRemoved | Tick


# Effects, to be carried out in their order


@dataclass(frozen=True)
class SavePlacement:
    """Make it durable before what follows is carried out."""

    holders: Mapping[AdapterId, tuple[str, ...]]


@dataclass(frozen=True)
class SendLoad:
    node_id: str
    command_id: int
    spec: AdapterSpec


@dataclass(frozen=True)
class SendDrop:
    node_id: str
    command_id: int
    adapter: AdapterId
    revision: str


@dataclass(frozen=True)
class PublishRoutes:
    """The table of `ControllerState.routes` has this version now."""

    version: int


@dataclass(frozen=True)
class NodeLost:
    node_id: str
    incarnation: int


@dataclass(frozen=True)
class AskRegister:
    """The node that sent the heartbeat is not known by this incarnation."""

    node_id: str
    incarnation: int


Effect = SavePlacement | SendLoad | SendDrop | PublishRoutes | NodeLost | AskRegister
