"""What nodes are seen to do, in the unit in which placement predicts it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loraserve.controller.events import DemandSample
from loraserve.controller.seen import WINDOW_S, SeenLoad
from loraserve.placement.columns import Entries, utilisation
from loraserve.placement.convert import columns_of
from loraserve.placement.load import LoadModel, default_load_model
from loraserve.placement.types import (
    AdapterId,
    AdapterSpec,
    Demand,
    NodeCapacity,
    PlacementProblem,
)
from loraserve.profiles.files import load_profile

PADDED = LoadModel(load_profile("a100-llama-2-7b-padded"))
SPECS = [
    AdapterSpec(AdapterId("t", "base", name), "r", size << 20, rank)
    for name, size, rank in (("a", 40, 8), ("b", 320, 64), ("c", 80, 16))
]
RATES = (Demand(300.0, 70.0), Demand(100.0, 30.0), Demand(0.0, 0.0))


def state(*nodes: NodeCapacity) -> Any:
    known = {spec.adapter: spec for spec in SPECS}
    return SimpleNamespace(
        nodes={n.node_id: SimpleNamespace(capacity=n) for n in nodes}, current=known.get
    )


def predicted(load: LoadModel, node: NodeCapacity) -> float:
    demand = {spec.adapter: rate for spec, rate in zip(SPECS, RATES, strict=True)}
    p = columns_of(PlacementProblem(tuple(SPECS), (node,), demand, load=load))
    count = len(SPECS)
    whole = Entries(np.arange(count), np.zeros(count, np.int64), np.ones(count))
    return float(utilisation(p, whole)[0])


@pytest.mark.parametrize("load", [default_load_model(), PADDED], ids=["proportional", "padded"])
@pytest.mark.parametrize("speed", [1.0, 0.5])
def test_traffic_as_predicted_is_the_predicted_utilisation(load: LoadModel, speed: float) -> None:
    now = 0.0
    seen = SeenLoad(load, lambda: now)
    node = NodeCapacity("n1", "base", 1 << 40, speed=speed)
    seen.heard("n1", [])
    for _ in range(20):  # half a second each
        now += WINDOW_S / 20
        seen.heard(
            "n1",
            [
                DemandSample(spec.adapter, rate.prefill / 2, rate.decode / 2)
                for spec, rate in zip(SPECS, RATES, strict=True)
                if rate.decode
            ],
        )
    want = predicted(load, node)
    assert want > 0.01
    assert seen.utilisation(state(node)) == {"n1": pytest.approx(want)}


def test_silent_and_unknown_nodes_have_no_value() -> None:
    now = 0.0
    seen = SeenLoad(default_load_model(), lambda: now)
    node = NodeCapacity("n1", "base", 1 << 40)
    stranger = AdapterId("t", "base", "gone")
    for name in ("n1", "n2"):
        seen.heard(name, [])
    assert seen.utilisation(state(node)) == {}  # no whole window yet
    now = WINDOW_S
    for name in ("n1", "n2"):
        seen.heard(name, [DemandSample(stranger, 1e30, 1e30)])
    assert seen.utilisation(state(node)) == {"n1": 0.0}
    now = 4 * WINDOW_S
    assert seen.utilisation(state(node)) == {}
