"""What the controller's core is told (events) and what it asks for (effects). Plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from loraserve.checkpoint.model_shape import ModelShape
from loraserve.controller.placing import PlacementAnswer, PlacementQuestion
from loraserve.controller.residency import Residency as Residency
from loraserve.controller.routes import RouteDelta
from loraserve.placement.types import AdapterId, AdapterSpec


@dataclass(frozen=True)
class NodeRecord:
    """A node as it registered itself. `domain`: nodes that fail together carry the same word; ""
    is a domain of its own. `speed` is relative to the profile that placement counts with. `shape`:
    of the base model; None where the node does not say."""

    node_id: str
    incarnation: int
    address: str
    base: str
    base_digest: str
    adapter_memory_bytes: int
    max_rank: int = 0
    domain: str = ""
    speed: float = 1.0
    shape: ModelShape | None = None


class Copy(NamedTuple):
    """One revision on one node, as the node reports it. `error` says why, where it failed;
    `size_bytes` is what it takes there, 0 where the node does not say. `refused`: it failed for a
    reason that trying again there does not change."""

    adapter: AdapterId
    revision: str
    state: Residency
    error: str = ""
    size_bytes: int = 0
    refused: bool = False


class CopyHolder(NamedTuple):
    """A node that holds a revision, and where it gives it to other nodes (host:port)."""

    node_id: str
    address: str


@dataclass(frozen=True)
class DemandSample:
    """Tokens of one adapter since the node's heartbeat before."""

    adapter: AdapterId
    prefill_tokens: float
    decode_tokens: float


# Events


@dataclass(frozen=True)
class NodeRegistered:
    """`heard_epoch`: the highest that the node has heard of; 0 for none."""

    node: NodeRecord
    heard_epoch: int = 0


@dataclass(frozen=True)
class Heartbeat:
    """`generation` rises whenever what the node holds changes. `copies` is everything it holds at
    `generation`; or, where `since_generation` is not 0, what changed between the two, and `removed`
    what went. `failed` are loads that ended in an error since the heartbeat before: (command id,
    why). `applied_command` is the highest command id whose effect `copies` show. `epoch` is the
    one that the node registered in; 0 where it does not say. `waiting_tokens`: of prompts that
    wait in its engine."""

    node_id: str
    incarnation: int
    generation: int
    copies: tuple[Copy, ...] = ()
    demand: tuple[DemandSample, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    draining: bool = False
    applied_command: int = 0
    since_generation: int = 0
    removed: tuple[tuple[AdapterId, str], ...] = ()
    epoch: int = 0
    waiting_tokens: int = 0


@dataclass(frozen=True)
class LinkLost:
    """The heartbeat stream of the node has ended; a live node opens another soon."""

    node_id: str
    incarnation: int


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


@dataclass(frozen=True)
class PlacementComputed:
    """The answer to a ComputePlacement. One that is not awaited any more changes nothing."""

    answer: PlacementAnswer


@dataclass(frozen=True)
class PlacementFailed:
    """Of a ComputePlacement there is no answer, by no word of the policy. As PlacementComputed, it
    changes nothing where it is not awaited any more."""

    question: PlacementQuestion
    why: str


Event = (
    NodeRegistered
    | Heartbeat
    | LinkLost
    | AdapterAdded
    | AdapterUpdated
    | AdapterRemoved
    | Tick
    | PlacementComputed
    | PlacementFailed
)


# Effects, to be carried out in their order


@dataclass(frozen=True)
class SavePlacement:
    """Make it durable before what follows is carried out. `holders` and `shares` of adapters whose
    placement changed; `removed` have none any more."""

    holders: Mapping[AdapterId, tuple[str, ...]]
    shares: Mapping[AdapterId, tuple[float, ...]] = field(default_factory=dict)
    removed: tuple[AdapterId, ...] = ()


@dataclass(frozen=True)
class SendLoad:
    """`peers`: whom to read it from, best first; none where nobody else holds it."""

    node_id: str
    command_id: int
    spec: AdapterSpec
    peers: tuple[CopyHolder, ...] = ()


@dataclass(frozen=True)
class SendDrop:
    node_id: str
    command_id: int
    adapter: AdapterId
    revision: str


@dataclass(frozen=True)
class PublishRoutes:
    """The table of `ControllerState.routes` has this version now, `delta` after the one before."""

    version: int
    delta: RouteDelta = field(default_factory=RouteDelta)


@dataclass(frozen=True)
class NodeLost:
    node_id: str
    incarnation: int


@dataclass(frozen=True)
class AskRegister:
    """The node that sent the heartbeat is not known by this incarnation."""

    node_id: str
    incarnation: int


@dataclass(frozen=True)
class AskResidency:
    """What the node said does not follow what is known of it: it is to say everything again."""

    node_id: str
    incarnation: int


@dataclass(frozen=True)
class TellOperator:
    """For the log: the wanted number of nodes has changed, or (`trouble`) placement has failed."""

    message: str
    trouble: bool = False


@dataclass(frozen=True)
class ComputePlacement:
    """Answer with PlacementComputed(solve(question)) or PlacementFailed, from wherever that takes
    no time of what else happens. Until then, or until the answer is overdue, the core asks for no
    other placement."""

    question: PlacementQuestion


Effect = (
    SavePlacement
    | SendLoad
    | SendDrop
    | PublishRoutes
    | NodeLost
    | AskRegister
    | AskResidency
    | TellOperator
    | ComputePlacement
)
