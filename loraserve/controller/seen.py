"""How busy nodes were by what they report: the cost model of placement on the traffic that was,
to be held against what placement predicted."""

import threading
import time
from collections.abc import Callable, Iterable

import numpy as np

from loraserve.controller.events import DemandSample
from loraserve.controller.state import ControllerState
from loraserve.placement.load import LoadModel
from loraserve.placement.operating_point import MAX_RANK
from loraserve.placement.types import AdapterId

# Of traffic, that one value is of.
WINDOW_S = 10.0

Tokens = tuple[float, float]  # of prompts, of answers


class _Window:
    """Of one node: what has come since `since_s`."""

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.tokens: dict[AdapterId, Tokens] = {}


class SeenLoad:
    """Heartbeats come on the event loop; `utilisation` may be asked in any thread."""

    def __init__(self, load: LoadModel, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds."""
        self._load = load
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, _Window] = {}
        # Of each node the last window that has ended, and how long it was.
        self._ended: dict[str, tuple[dict[AdapterId, Tokens], float]] = {}

    def heard(self, node_id: str, demand: Iterable[DemandSample]) -> None:
        """What a heartbeat brings."""
        now = self._clock()
        with self._lock:
            window = self._open.get(node_id)
            if window is None:
                window = self._open[node_id] = _Window(now)
            tokens = window.tokens
            for sample in demand:
                prefill, decode = tokens.get(sample.adapter, (0.0, 0.0))
                tokens[sample.adapter] = (
                    prefill + sample.prefill_tokens,
                    decode + sample.decode_tokens,
                )
            if now - window.since_s >= WINDOW_S:
                self._ended[node_id] = tokens, now - window.since_s
                self._open[node_id] = _Window(now)

    def utilisation(self, state: ControllerState) -> dict[str, float]:
        """By node, of those that are registered: over the last whole window, 1 at the SLO's limit.
        Nodes that are not heard from for two windows are left out."""
        now = self._clock()
        found = {}
        with self._lock:
            for node_id in [n for n in self._open if n not in state.nodes]:
                del self._open[node_id]
                self._ended.pop(node_id, None)
            ended = {
                node_id: window
                for node_id, window in self._ended.items()
                if now - self._open[node_id].since_s < 2 * WINDOW_S
            }
        nodes = dict(state.nodes)
        for node_id, (tokens, seconds) in ended.items():
            if node_id in nodes:
                speed = nodes[node_id].capacity.speed
                found[node_id] = self._of(state, tokens, seconds, speed)
        return found

    def _of(
        self,
        state: ControllerState,
        tokens: dict[AdapterId, Tokens],
        seconds: float,
        speed: float,
    ) -> float:
        """One node's. Adapters that are not in the registry any more count nothing."""
        known = [(spec, tokens[a]) for a in tokens if (spec := state.current(a)) is not None]
        if not known:
            return 0.0
        rank = np.array([spec.max_rank for spec, _ in known], np.int64)
        charges = self._load.charges(
            np.array([spec.size_bytes for spec, _ in known], np.int64),
            rank,
            np.array([prefill for _, (prefill, _) in known]) / seconds,
            np.array([decode for _, (_, decode) in known]) / seconds,
        )
        features = charges.features(np.arange(len(known)), np.ones(len(known))).sum(axis=0)
        weights = charges.weights[min(int(rank.max()), MAX_RANK)]
        capacity = self._load.capacity(np.array([speed]))[0]
        return float(features @ weights / capacity)
