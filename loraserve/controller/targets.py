"""Where placement wants the adapters to be: by adapter, by node, and the bytes that it promised."""

from collections.abc import Iterator, Mapping, Set
from typing import NamedTuple

from loraserve.controller.routes import WHOLE_WEIGHT
from loraserve.placement.types import AdapterId


class Target(NamedTuple):
    """Nodes by id, and which part of the adapter's requests each is to get."""

    nodes: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()

    @property
    def parts(self) -> Iterator[tuple[str, float]]:
        return zip(self.nodes, self.shares, strict=True)

    @property
    def weights(self) -> dict[str, int]:
        """For routes: over 0, WHOLE_WEIGHT for all requests."""
        if len(self.nodes) == 1:
            return {self.nodes[0]: WHOLE_WEIGHT}
        return {n: max(1, round(WHOLE_WEIGHT * s)) for n, s in self.parts}


NOWHERE = Target()


def target(nodes: tuple[str, ...], shares: tuple[float, ...] = ()) -> Target:
    """Equal shares where none are given."""
    if len(nodes) == 1:
        return Target(nodes, shares if len(shares) == 1 else (1.0,))
    if len(shares) != len(nodes):
        shares = (1 / max(1, len(nodes)),) * len(nodes)
    order = sorted(zip(nodes, shares, strict=True))
    return Target(tuple(n for n, _ in order), tuple(s for _, s in order))


class Targets:
    """What is not in it is wanted nowhere."""

    def __init__(self) -> None:
        self._targets: dict[AdapterId, Target] = {}
        self._sizes: dict[AdapterId, int] = {}
        self._on_node: dict[str, set[AdapterId]] = {}
        self._promised: dict[str, int] = {}

    def __getitem__(self, adapter: AdapterId) -> Target:
        return self._targets.get(adapter, NOWHERE)

    @property
    def all(self) -> Mapping[AdapterId, Target]:
        return self._targets

    def on_node(self, node_id: str) -> Set[AdapterId]:
        return self._on_node.get(node_id, frozenset())

    def promised_bytes(self, node_id: str) -> int:
        return self._promised.get(node_id, 0)

    def nodes(self) -> set[str]:
        """All that are wanted for something."""
        return {node for node, held in self._on_node.items() if held}

    def put(self, adapter: AdapterId, wanted: Target, size_bytes: int) -> bool:
        """Whether the target is another than before."""
        before = self[adapter]
        for node in before.nodes:
            self._on_node[node].discard(adapter)
            self._promised[node] -= self._sizes[adapter]
        for node in wanted.nodes:
            self._on_node.setdefault(node, set()).add(adapter)
            self._promised[node] = self._promised.get(node, 0) + size_bytes
        if wanted.nodes:
            self._targets[adapter], self._sizes[adapter] = wanted, size_bytes
        else:
            self._targets.pop(adapter, None)
            self._sizes.pop(adapter, None)
        return wanted != before
