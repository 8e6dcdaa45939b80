"""Which nodes a node is to read a copy from instead of the durable store.

The choice is made when a load is asked for and when a node asks which revision a name means. It is
a hint: the reader verifies what it gets and goes on to the next one, then to the store.
"""

from collections import Counter, deque
from typing import NamedTuple
from zlib import crc32

from loraserve.controller.events import Copy, CopyHolder
from loraserve.controller.membership import CopyKey, Membership, Node
from loraserve.controller.residency import Residency

# Told with a load: one to try, one to try next, and one where those two just went.
MAX_HOLDERS = 3
# A read that nobody reports the end of is forgotten after so many ticks.
READ_MEMORY_TICKS = 60
# What a read from another failure domain counts as, in reads from the reader's own: those of one
# host share its memory, those of one rack its switch.
FAR_READS = 2


class _Read(NamedTuple):
    holder: str
    tick: int


class PeerChoice:
    """Remembers who was told to read from whom, so that holders share the reads among them. All
    operations but `holders` cost the same however many reads there are."""

    def __init__(self, members: Membership) -> None:
        self._members = members
        self._reads: dict[tuple[str, CopyKey], _Read] = {}
        self._by_age: deque[tuple[int, str, CopyKey]] = deque()
        self._outgoing: Counter[str] = Counter()

    def outgoing(self, node_id: str) -> int:
        """Reads that the node was named first for and that have not ended, as far as is known."""
        return self._outgoing[node_id]

    def holders(self, key: CopyKey, reader: Node | None = None) -> tuple[CopyHolder, ...]:
        """Up to MAX_HOLDERS nodes that hold the revision whole, best first; never the reader, nor a
        node that is not heard of or is to drop the copy. `reader` None: some node that does not
        hold it."""
        reader_id = reader.record.node_id if reader else ""
        found = [
            node
            for node in self._members.holders(key[0])
            if node.record.node_id != reader_id and _gives(node, key)
        ]
        if len(found) > 1:
            domain = reader.record.domain if reader else ""
            found.sort(key=lambda node: self._cost(node, key, reader_id, domain))
        return tuple(
            CopyHolder(node.record.node_id, node.record.address) for node in found[:MAX_HOLDERS]
        )

    def _cost(
        self, node: Node, key: CopyKey, reader_id: str, domain: str
    ) -> tuple[bool, int, int, int, str]:
        """Lower is better. Nodes that drain come last: what they read out delays their end. Where
        nothing else decides, chance does, the same for the same three."""
        node_id = node.record.node_id
        near = bool(domain) and node.record.domain == domain
        reads = (self._outgoing[node_id] + 1) * (1 if near else FAR_READS)
        lot = crc32(f"{reader_id}\n{key[1]}\n{node_id}".encode())
        return node.draining, reads, node.waiting_tokens, lot, node_id

    def begin(self, reader_id: str, key: CopyKey, holder_id: str, tick: int) -> None:
        """The reader has been told to read from this holder first."""
        self.end(reader_id, key)
        self._reads[reader_id, key] = _Read(holder_id, tick)
        self._by_age.append((tick, reader_id, key))
        self._outgoing[holder_id] += 1

    def end(self, reader_id: str, key: CopyKey) -> None:
        """The reader has the copy, has failed, or does not load it any more."""
        read = self._reads.pop((reader_id, key), None)
        if read is not None:
            self._outgoing[read.holder] -= 1
            if not self._outgoing[read.holder]:
                del self._outgoing[read.holder]

    def reported(self, reader_id: str, key: CopyKey, copy: Copy | None) -> None:
        """What the reader holds has changed."""
        if copy is None or copy.state not in (Residency.PENDING, Residency.FETCHING):
            self.end(reader_id, key)

    def forget_before(self, tick: int) -> None:
        """Takes reads that began before the tick for ended."""
        while self._by_age and self._by_age[0][0] < tick:
            _, reader_id, key = self._by_age.popleft()
            read = self._reads.get((reader_id, key))
            if read is not None and read.tick < tick:
                self.end(reader_id, key)


def _gives(node: Node, key: CopyKey) -> bool:
    copy = node.copies.get(key)
    return copy is not None and copy.state.serves and node.heard and key not in node.drops
