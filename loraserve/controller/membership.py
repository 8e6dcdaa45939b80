"""The nodes that the controller knows, and what each is known to hold."""

from dataclasses import dataclass, field

from loraserve.controller.events import Copy, Heartbeat, NodeRecord, Residency
from loraserve.errors import FailedPreconditionError
from loraserve.placement.types import AdapterId, AdapterSpec, NodeCapacity

CopyKey = tuple[AdapterId, str]  # adapter and revision


@dataclass
class SentLoad:
    """A load command that has not shown in the node's residency yet."""

    command_id: int
    tick: int
    spec: AdapterSpec


@dataclass
class SentDrop:
    """A drop command that the node has not applied yet: its copy serves nothing from now on,
    whatever the node still reports."""

    command_id: int
    tick: int


# A drop that a node neither applies nor loses with its stream is forgotten after so many ticks.
DROP_MEMORY_TICKS = 60


@dataclass
class Node:
    """`heard_tick` is that of the last sign of life. Until `reported`, nobody knows what the node
    holds, so nothing is asked of it."""

    record: NodeRecord
    heard_tick: int
    reported: bool = False
    generation: int = -1
    draining: bool = False
    copies: dict[CopyKey, Copy] = field(default_factory=dict)
    loads: dict[CopyKey, SentLoad] = field(default_factory=dict)
    drops: dict[CopyKey, SentDrop] = field(default_factory=dict)

    @property
    def capacity(self) -> NodeCapacity:
        r = self.record
        return NodeCapacity(r.node_id, r.base, r.adapter_memory_bytes, r.max_rank)


def _answers(copy: Copy | None) -> bool:
    """Whether a reported copy shows that a load command arrived."""
    return copy is not None and copy.state not in (Residency.FAILED, Residency.DRAINING)


class Membership:
    """Nodes by id. A higher incarnation replaces a lower one and starts with nothing known."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def register(self, record: NodeRecord, tick: int) -> bool:
        """Whether anything changed. Raises FailedPreconditionError for a stale incarnation."""
        known = self.nodes.get(record.node_id)
        if known is not None and record.incarnation < known.record.incarnation:
            raise FailedPreconditionError(
                "incarnation",
                f"{record.incarnation} of node {record.node_id!r} is older than "
                f"{known.record.incarnation}, which is registered: is the id used twice?",
            )
        if known is not None and known.record == record:
            known.heard_tick = tick
            # Commands went with the stream that carried them, or were applied before this.
            known.loads, known.drops = {}, {}
            return False
        self.nodes[record.node_id] = Node(record, tick)
        return True

    def hear(self, beat: Heartbeat, tick: int) -> tuple[Node | None, bool]:
        """The node of the heartbeat, None where it must register; and whether what is known of it
        changed."""
        node = self.nodes.get(beat.node_id)
        if node is None or node.record.incarnation != beat.incarnation:
            return None, False
        node.heard_tick = tick
        changed = not node.reported or node.draining != beat.draining
        node.reported, node.draining = True, beat.draining
        if beat.generation >= node.generation:
            copies = {(c.adapter, c.revision): c for c in beat.copies}
            changed = changed or copies != node.copies
            node.generation, node.copies = beat.generation, copies
            # The node's word replaces what was only asked of it.
            node.loads = {k: s for k, s in node.loads.items() if not _answers(copies.get(k))}
            node.drops = {
                k: sent
                for k, sent in node.drops.items()
                if k in copies
                and sent.command_id > beat.applied_command
                and tick - sent.tick < DROP_MEMORY_TICKS
            }
        return node, changed

    def expire(self, tick: int, silent_ticks: int) -> list[Node]:
        """Removes and returns the nodes that were silent for more than `silent_ticks`."""
        lost = [n for n in self.nodes.values() if tick - n.heard_tick > silent_ticks]
        for node in lost:
            del self.nodes[node.record.node_id]
        return lost
