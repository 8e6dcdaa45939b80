"""The entries of a client's route table."""

from dataclasses import dataclass

from loraserve.placement.types import AdapterId


@dataclass(frozen=True)
class Holder:
    """`state` is a ResidencyState of the wire; `weight` is relative to the other holders'."""

    node_id: str
    weight: int
    state: int


@dataclass(frozen=True)
class RevisionRoute:
    revision: str
    holders: tuple[Holder, ...]
    max_rank: int = 0
    size_bytes: int = 0


@dataclass(frozen=True)
class AdapterRoute:
    """`revision` is what requests by name get; `unrouted_reason` is set where no node serves it."""

    adapter: AdapterId
    revision: str
    revisions: tuple[RevisionRoute, ...] = ()
    unrouted_reason: str = ""

    def of(self, revision: str | None) -> RevisionRoute | None:
        """The route of a revision, by default of that which requests by name get."""
        wanted = revision or self.revision
        return next((r for r in self.revisions if r.revision == wanted), None)


@dataclass(frozen=True)
class RankCosts:
    """What ranks cost in an engine step, in decode tokens of the base model: of a request for each
    unit of its `own` rank; and of every request for each unit of the batch's largest (`padded`)."""

    own: float = 0.0
    padded: float = 0.0


@dataclass(frozen=True)
class NodeRoute:
    node_id: str
    address: str
    draining: bool = False
    incarnation: int = 0
    base: str = ""
    base_digest: str = ""
