"""Requests that wait in an engine: one queue for each adapter, heads in order of arrival."""

import heapq
from collections import deque
from collections.abc import Iterator

from loraserve.sim.sequence import SimSequence


class EngineQueue:
    """`heads` is a heap of (order, adapter), one for each queue that is not set aside."""

    def __init__(self) -> None:
        self.heads: list[tuple[int, int]] = []
        self._queues: dict[int, deque[SimSequence]] = {}
        self._aside: list[tuple[int, int]] = []
        self.count = 0
        self.tokens = 0

    def __iter__(self) -> Iterator[SimSequence]:
        for queue in self._queues.values():
            yield from queue

    def add(self, sequence: SimSequence) -> None:
        self.count += 1
        self.tokens += sequence.tokens
        queue = self._queues.get(sequence.adapter)
        if queue is None:
            self._queues[sequence.adapter] = deque([sequence])
            heapq.heappush(self.heads, (sequence.order, sequence.adapter))
        elif sequence.order > queue[-1].order:
            queue.append(sequence)
        else:  # preempted or late: to its place
            self.heads.remove((queue[0].order, sequence.adapter))
            ordered = sorted([*queue, sequence], key=lambda s: s.order)
            self._queues[sequence.adapter] = deque(ordered)
            self.heads.append((ordered[0].order, sequence.adapter))
            heapq.heapify(self.heads)

    def first(self) -> SimSequence:
        """The head of the heads."""
        return self._queues[self.heads[0][1]][0]

    def take(self) -> SimSequence:
        """Removes `first`."""
        _, adapter = heapq.heappop(self.heads)
        queue = self._queues[adapter]
        sequence = queue.popleft()
        if queue:
            heapq.heappush(self.heads, (queue[0].order, adapter))
        else:
            del self._queues[adapter]
        self.count -= 1
        self.tokens -= sequence.tokens
        return sequence

    def set_aside(self) -> None:
        """The first head's adapter is passed over until `bring_back`."""
        self._aside.append(heapq.heappop(self.heads))

    def bring_back(self) -> None:
        for head in self._aside:
            heapq.heappush(self.heads, head)
        self._aside.clear()
