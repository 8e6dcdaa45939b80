"""What nodes say, with what cannot be true taken out and counted. A node is a peer, not an oracle:
its rubbish must never move an adapter."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from loraserve.controller.catalog import Catalog
from loraserve.controller.events import Copy, DemandSample, Heartbeat
from loraserve.controller.membership import CopyKey

# More tokens than this of one adapter between two heartbeats are not real: a thousand times what a
# node can compute.
MAX_TOKENS = 1e8
MAX_BYTES = 1 << 50


class Reports:
    """`ignored` counts by reason."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.ignored: Counter[str] = Counter()

    def count(self, reason: str) -> None:
        self.ignored[reason] += 1

    def copies(self, beat: Heartbeat) -> dict[CopyKey, Copy]:
        """By adapter and revision, with sizes: ours where we know the revision."""
        found: dict[CopyKey, Copy] = {}
        for copy in beat.copies:
            key = (copy.adapter, copy.revision)
            if key in found:
                self.count("copy twice")
                continue
            size = copy.size_bytes
            spec = self._catalog.revision(*key)
            if spec is not None:
                size = spec.size_bytes
            elif not 0 <= size <= MAX_BYTES:
                self.count("size out of range")
                size = 0
            found[key] = copy if size == copy.size_bytes else copy._replace(size_bytes=size)
        return found

    def demand(self, beat: Heartbeat) -> Iterator[DemandSample]:
        for sample in beat.demand:
            counts = (sample.prefill_tokens, sample.decode_tokens)
            if not all(math.isfinite(n) and 0 <= n <= MAX_TOKENS for n in counts):
                self.count("demand out of range")
            elif sample.adapter not in self._catalog:
                self.count("demand of an unknown adapter")
            else:
                yield sample

    def applied(self, beat: Heartbeat, last_command: int) -> Heartbeat:
        """A command that was never sent is not applied."""
        if beat.applied_command <= last_command:
            return beat
        self.count("command that was never sent")
        return replace(beat, applied_command=0)
