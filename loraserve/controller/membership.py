"""The nodes that the controller knows, and what each is known to hold."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraserve.controller.events import Copy, Heartbeat, NodeRecord
from loraserve.controller.residency import Residency
from loraserve.errors import FailedPreconditionError, InvalidArgumentError
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


# So few may always fall quiet together.
MOST_QUIET_TOGETHER = 4
# A drop that a node neither applies nor loses with its stream is forgotten after so many ticks.
DROP_MEMORY_TICKS = 60


@dataclass
class Node:
    """`heard_tick` is that of the last sign of life. Until `reported`, nobody knows what the node
    holds, so nothing is asked of it. `unlinked_tick`: since when its heartbeat stream is gone.
    `quiet`: it has said nothing for longer than it should, over a stream that stands."""

    record: NodeRecord
    heard_tick: int
    reported: bool = False
    generation: int = -1
    draining: bool = False
    unlinked_tick: int | None = None
    quiet: bool = False
    copies: dict[CopyKey, Copy] = field(default_factory=dict)
    loads: dict[CopyKey, SentLoad] = field(default_factory=dict)
    drops: dict[CopyKey, SentDrop] = field(default_factory=dict)
    # Loads that find no room here, and since when.
    cramped: dict[CopyKey, int] = field(default_factory=dict)
    used_bytes: int = 0
    waiting_tokens: int = 0
    # Of all `loads`.
    loading_bytes: int = 0
    # Keys of `copies` by adapter.
    revisions: dict[AdapterId, set[CopyKey]] = field(default_factory=dict)

    @property
    def capacity(self) -> NodeCapacity:
        r = self.record
        return NodeCapacity(
            r.node_id, r.base, r.adapter_memory_bytes, r.max_rank, r.domain, r.speed
        )

    @property
    def heard(self) -> bool:
        """Whether it is there, as far as can be told."""
        return self.unlinked_tick is None and not self.quiet

    @property
    def takes_loads(self) -> bool:
        return self.reported and not self.draining and self.unlinked_tick is None

    def has_room(self, spec: AdapterSpec) -> bool:
        """Whether the copy fits beside what is here and on its way. Another revision of the same
        adapter does not count: it goes when this one serves, and the node allows it."""
        taken = self.used_bytes + self.loading_bytes
        taken -= sum(_room(copy) for _, copy in self.copies_of(spec.adapter))
        return taken + spec.size_bytes <= self.record.adapter_memory_bytes

    def copies_of(self, adapter: AdapterId) -> list[tuple[CopyKey, Copy]]:
        return [(key, self.copies[key]) for key in self.revisions.get(adapter, ())]

    def expect(self, key: CopyKey, sent: SentLoad) -> None:
        """The load was asked for."""
        self.forget_load(key)
        self.loads[key] = sent
        self.loading_bytes += sent.spec.size_bytes

    def forget_load(self, key: CopyKey) -> None:
        """It shows, has failed, or went with the stream that carried it."""
        sent = self.loads.pop(key, None)
        if sent is not None:
            self.loading_bytes -= sent.spec.size_bytes

    def forget_loads(self) -> None:
        self.loads, self.loading_bytes = {}, 0

    def put(self, key: CopyKey, copy: Copy | None) -> None:
        """The copy is as reported; None: it is gone."""
        old = self.copies.pop(key, None)
        if old is not None:
            self.used_bytes -= _room(old)
            self.revisions[key[0]].discard(key)
            if not self.revisions[key[0]]:
                del self.revisions[key[0]]
        if copy is not None:
            self.copies[key] = copy
            self.used_bytes += _room(copy)
            self.revisions.setdefault(key[0], set()).add(key)


def _room(copy: Copy) -> int:
    return 0 if copy.state is Residency.FAILED else copy.size_bytes


@dataclass
class Heard:
    """What a heartbeat changed. `changed`: copies that are not what they were, with what they were.
    `released`: keys whose drop or load is not awaited any more. `roomier`: memory became free."""

    node: Node
    changed: dict[CopyKey, Copy | None] = field(default_factory=dict)
    released: set[CopyKey] = field(default_factory=set)
    first_report: bool = False
    drains: bool = False
    gap: bool = False
    roomier: bool = False


class Membership:
    """Nodes by id. A higher incarnation replaces a lower one and starts with nothing known."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        # Of each adapter the nodes with a copy of any revision.
        self._holders: dict[AdapterId, set[str]] = {}
        # In the order in which they were heard of last.
        self._by_silence: dict[str, None] = {}

    def register(self, record: NodeRecord, tick: int) -> Node | None:
        """The node that this one replaces, if any; None also where it only says again who it is.

        Raises FailedPreconditionError for a stale incarnation, InvalidArgumentError for a node that
        cannot be."""
        _check(record)
        known = self.nodes.get(record.node_id)
        if known is not None and record.incarnation < known.record.incarnation:
            raise FailedPreconditionError(
                "incarnation",
                f"{record.incarnation} of node {record.node_id!r} is older than "
                f"{known.record.incarnation}, which is registered: is the id used twice?",
            )
        if known is not None and known.record == record:
            self._alive(known, tick)
            # Commands went with the stream that carried them, or were applied before this; the
            # next heartbeat says everything.
            known.forget_loads()
            known.drops, known.generation = {}, -1
            return None
        if known is not None:
            self._remove(known)
        self.nodes[record.node_id] = Node(record, tick)
        self._alive(self.nodes[record.node_id], tick)
        return known

    def _alive(self, node: Node, tick: int) -> None:
        node.heard_tick, node.unlinked_tick, node.quiet = tick, None, False
        self._by_silence.pop(node.record.node_id, None)
        self._by_silence[node.record.node_id] = None

    def hear(self, beat: Heartbeat, copies: Mapping[CopyKey, Copy], tick: int) -> Heard | None:
        """What the heartbeat tells; None where the node must register. `copies` are the beat's."""
        node = self.nodes.get(beat.node_id)
        if node is None or node.record.incarnation != beat.incarnation:
            return None
        heard = Heard(node, first_report=not node.reported, drains=node.draining != beat.draining)
        if not node.heard:
            heard.released |= node.copies.keys()
        self._alive(node, tick)
        node.draining, node.waiting_tokens = beat.draining, beat.waiting_tokens
        if beat.since_generation:
            heard.gap = beat.since_generation != node.generation
            if heard.gap:
                return heard
            changes: dict[CopyKey, Copy | None] = {**copies, **dict.fromkeys(beat.removed)}
        elif beat.generation < node.generation:
            return heard  # late, of a stream before
        else:
            changes = {**dict.fromkeys(node.copies.keys() - copies.keys()), **copies}
        node.reported, node.generation = True, beat.generation
        before = node.used_bytes
        for key, copy in changes.items():
            old = node.copies.get(key)
            if old != copy:
                heard.changed[key] = old
                self._put(node, key, copy)
        heard.roomier = node.used_bytes < before
        self._settle(node, beat, tick, heard)
        return heard

    @staticmethod
    def _settle(node: Node, beat: Heartbeat, tick: int, heard: Heard) -> None:
        """The node's word replaces what was only asked of it."""
        for key in [k for k in node.loads if k in node.copies and node.copies[k].state.present]:
            node.forget_load(key)
        for key, sent in list(node.drops.items()):
            late = tick - sent.tick >= DROP_MEMORY_TICKS
            if key not in node.copies or sent.command_id <= beat.applied_command or late:
                del node.drops[key]
                heard.released.add(key)

    def _put(self, node: Node, key: CopyKey, copy: Copy | None) -> None:
        node.put(key, copy)
        if key[0] in node.revisions:
            self._holders.setdefault(key[0], set()).add(node.record.node_id)
        else:
            self._leave(key[0], node.record.node_id)

    def _leave(self, adapter: AdapterId, node_id: str) -> None:
        holders = self._holders.get(adapter, set())
        holders.discard(node_id)
        if not holders:
            self._holders.pop(adapter, None)

    def holders(self, adapter: AdapterId) -> list[Node]:
        """Nodes with a copy of some revision, by id."""
        ids = self._holders.get(adapter)
        if ids is None:
            return []
        return [self.nodes[n] for n in (ids if len(ids) == 1 else sorted(ids))]

    def unlink(self, node_id: str, incarnation: int, tick: int) -> Node | None:
        """The node whose stream has ended; None where that is nothing new."""
        node = self.nodes.get(node_id)
        if node is None or node.record.incarnation != incarnation or node.unlinked_tick is not None:
            return None
        node.unlinked_tick = tick
        node.forget_loads()
        return node

    def fall_quiet(self, tick: int, quiet_ticks: int) -> list[Node]:
        """The nodes that are silent for too long to be trusted, since this tick.

        None, where more than half of a cluster falls silent together: rather than so many nodes,
        this process or its network was held up, and other copies are no better.
        """
        found = []
        for node_id in self._by_silence:
            node = self.nodes[node_id]
            if tick - node.heard_tick <= quiet_ticks:
                break  # those that follow were heard of later
            if not node.quiet:
                found.append(node)
        if len(found) > max(MOST_QUIET_TOGETHER, len(self.nodes) // 2):
            return []
        for node in found:
            node.quiet = True
        return found

    def expire(self, tick: int, silent_ticks: int, unlinked_ticks: int) -> list[Node]:
        """Removes and returns the nodes that were silent for too long."""
        lost = []
        for node_id in list(self._by_silence):
            node = self.nodes[node_id]
            if tick - node.heard_tick <= min(silent_ticks, unlinked_ticks):
                break  # those that follow were heard of later
            unlinked = node.unlinked_tick
            gone = unlinked is not None and tick - unlinked > unlinked_ticks
            if gone or tick - node.heard_tick > silent_ticks:
                lost.append(node)
                self._remove(node)
        return lost

    def _remove(self, node: Node) -> None:
        node_id = node.record.node_id
        for adapter in node.revisions:
            self._leave(adapter, node_id)
        del self.nodes[node_id]
        del self._by_silence[node_id]


def _check(record: NodeRecord) -> None:
    if record.adapter_memory_bytes < 0 or record.max_rank < 0:
        raise InvalidArgumentError("adapter_memory_bytes", "and limits.max_rank: at least 0")
    if not (math.isfinite(record.speed) and record.speed > 0):
        raise InvalidArgumentError("relative_speed", f"{record.speed}: a finite number over 0")
