"""From the placement that is to the one that is wanted: load at the target, then move the routes,
then drain, then drop at the source.

A `Migration` is driven by what nodes report and can be thrown away and made anew at any moment: its
steps follow from the reported copies alone (a restarted controller goes on where the old one was).
Only the byte budget is counted inside. Invariants, whatever is reported:
 - a copy is dropped only after it has left the routes and its node says that it is drained, and
   only while another copy serves, so the last copy that serves never goes;
 - an adapter stays on every copy that serves until all its targets serve;
 - loads for balance wait once the budget of the interval is spent, most value per byte first;
   loads of adapters that nothing serves never wait.
"""

import enum
import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from loraserve.placement.types import AdapterId, Placement

Pair = tuple[AdapterId, str]  # a copy: adapter and node id


class CopyState(enum.Enum):
    """Of a copy of the current revision, as its node reports it. What is not reported is absent."""

    LOADING = 1
    SERVING = 2
    DRAINED = 3
    """Serves, is in no route, and no request uses it any more."""
    FAILED = 4


class StepKind(enum.Enum):
    LOAD = 1
    ROUTE = 2
    DRAIN = 3
    DROP = 4


@dataclass(frozen=True, order=True)
class Step:
    """One thing to ask for now. ROUTE: the adapter's requests go to `weights` from now on, its node
    is "". DRAIN: let no new request in. Steps may be asked for again until a report shows them."""

    adapter: AdapterId
    kind: StepKind = field(compare=False)
    node_id: str = ""
    weights: tuple[tuple[str, int], ...] = ()


@dataclass
class _Move:
    """One adapter's way to its targets."""

    adapter: AdapterId
    targets: dict[str, int]  # with weights
    size_bytes: int
    value: float
    started: set[str] = field(default_factory=set)


class Migration:
    """Towards one placement. `steps` is called with each new report, and once an interval
    `new_interval` renews the budget."""

    def __init__(
        self,
        wanted: Placement,
        sizes: Mapping[AdapterId, int],
        values: Mapping[AdapterId, float],
        byte_budget: int | None = None,
    ) -> None:
        """`sizes`: bytes of a copy. `values`: what moving the adapter is worth, its demand in
        tokens/s, say. `byte_budget`: bytes to load in an interval; None is no limit. A copy over
        the whole budget is loaded alone in an interval of its own, so that it is not stuck."""
        self._budget = byte_budget
        self._spent = 0
        self._unplaced = frozenset(wanted.unplaced)
        self._moves = {
            a: _Move(a, wanted.weights(a), sizes.get(a, 0), values.get(a, 0.0))
            for a in wanted.holders
        }
        self._routed: dict[AdapterId, dict[str, int]] = {}

    @property
    def spent_bytes(self) -> int:
        """Loaded in this interval so far."""
        return self._spent

    def new_interval(self) -> None:
        self._spent = 0

    def routed(self, adapter: AdapterId) -> Mapping[str, int]:
        """Weights by node that the last ROUTE step gave; empty before the first."""
        return self._routed.get(adapter, {})

    def waiting(self, copies: Mapping[Pair, CopyState]) -> list[Pair]:
        """Copies that are wanted, not there and not asked for: they wait for budget."""
        return sorted(
            (a, n)
            for a, move in self._moves.items()
            for n in move.targets
            if (a, n) not in copies and n not in move.started
        )

    def steps(
        self,
        copies: Mapping[Pair, CopyState],
        able: Iterable[str],
        adapters: Iterable[AdapterId] | None = None,
    ) -> list[Step]:
        """What to ask for now. `copies`: all that nodes report. `able`: nodes that take loads.
        `adapters`: only these changed since the last call; None looks at all."""
        usable = set(able)
        held: dict[AdapterId, dict[str, CopyState]] = {}
        chosen = None if adapters is None else set(adapters)
        for (adapter, node), state in copies.items():
            if chosen is None or adapter in chosen:
                held.setdefault(adapter, {})[node] = state
        out: list[Step] = []
        loads: list[tuple[bool, float, AdapterId, str]] = []
        for adapter in sorted(chosen if chosen is not None else self._moves.keys() | held.keys()):
            move = self._moves.get(adapter)
            mine = held.get(adapter, {})
            if move is None:
                out += self._retire(adapter, mine)
                continue
            out += self._route(move, mine)
            serving = any(_serves(s) for s in mine.values())
            for node in sorted(move.targets):
                if mine.get(node) in (None, CopyState.FAILED) and node in usable:
                    if node in move.started and node not in mine:
                        out.append(Step(adapter, StepKind.LOAD, node))  # asked and not shown yet
                    else:
                        worth = move.value / max(1, move.size_bytes)
                        loads.append((serving, -worth, adapter, node))
        return out + self._affordable(loads)

    def _affordable(self, loads: list[tuple[bool, float, AdapterId, str]]) -> list[Step]:
        """Loads within the budget; one for each adapter that nothing serves in any case."""
        out = []
        rescued: set[AdapterId] = set()
        heapq.heapify(loads)
        while loads:
            serving, _, adapter, node = heapq.heappop(loads)
            move = self._moves[adapter]
            urgent = not serving and adapter not in rescued and not move.started
            fits = self._budget is None or self._spent + move.size_bytes <= self._budget
            alone = self._budget is not None and self._spent == 0
            if not (urgent or fits or alone):
                continue
            rescued.add(adapter)
            move.started.add(node)
            self._spent += move.size_bytes
            out.append(Step(adapter, StepKind.LOAD, node))
        return out

    def failed(self, adapter: AdapterId, node_id: str) -> None:
        """The load was refused or lost: it counts as not asked for, its bytes as spent."""
        move = self._moves.get(adapter)
        if move is not None:
            move.started.discard(node_id)

    def _route(self, move: _Move, mine: Mapping[str, CopyState]) -> list[Step]:
        """Routes for what serves, then drain and drop of what is not wanted."""
        serving = {n for n, s in mine.items() if _serves(s)}
        arrived = serving & move.targets.keys()
        weights = {n: move.targets[n] for n in sorted(arrived)}
        if arrived != move.targets.keys():
            # Until every target serves, those that are to go help on.
            old = self._routed.get(move.adapter, {})
            for n in sorted(serving - arrived):
                if mine[n] is CopyState.SERVING:
                    weights[n] = old.get(n) or max(move.targets.values(), default=1)
            if not weights and serving:
                weights = dict.fromkeys(sorted(serving), 1)
        out = []
        if weights and weights != self._routed.get(move.adapter):
            self._routed[move.adapter] = weights
            out.append(Step(move.adapter, StepKind.ROUTE, "", tuple(sorted(weights.items()))))
        for n in sorted(serving - weights.keys()):
            if arrived:
                drained = mine[n] is CopyState.DRAINED
                kind = StepKind.DROP if drained else StepKind.DRAIN
                out.append(Step(move.adapter, kind, n))
        for n in sorted(mine.keys() - move.targets.keys()):
            if mine[n] is CopyState.FAILED:
                out.append(Step(move.adapter, StepKind.DROP, n))
        return out

    def _retire(self, adapter: AdapterId, mine: Mapping[str, CopyState]) -> list[Step]:
        """An unplaced adapter keeps its copies, they may be its last; one that left the cluster
        keeps none."""
        if adapter in self._unplaced:
            return []
        ready = (CopyState.DRAINED, CopyState.FAILED)
        return [
            Step(adapter, StepKind.DROP if state in ready else StepKind.DRAIN, n)
            for n, state in sorted(mine.items())
            if state is not CopyState.LOADING
        ]


def _serves(state: CopyState) -> bool:
    return state in (CopyState.SERVING, CopyState.DRAINED)
