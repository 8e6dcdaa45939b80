"""The wanted number of nodes, against the policy that would use them."""

from dataclasses import replace

import numpy as np
import pytest
from placement_makers import model, problem

from loraserve.placement.autoscale import _cluster, wanted_nodes
from loraserve.placement.columns import peak
from loraserve.placement.policies import COLUMN_POLICIES


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("busy", [0.1, 0.7, 2.0])
def test_so_many_are_enough_and_one_less_is_not(busy: float, padded: bool) -> None:
    p = problem(200, 8, 1, load=model(padded=padded), busy=busy, slack=20.0)
    wanted = wanted_nodes(p, target=0.8)
    peaks = []
    for count in (wanted.nodes, wanted.nodes - 1):
        if count:
            q = _cluster(p, count, 1.0)
            peaks.append(peak(q, COLUMN_POLICIES["rank_aware"](q).entries))
    assert peaks[0] <= 0.8 * 1.03
    assert len(peaks) == 1 or peaks[1] > 0.8
    assert "0.80 is the target" in wanted.reason


def test_memory_and_replicas_count_too() -> None:
    p = problem(100, 4, 1, busy=0.01, slack=1.0)
    size = int(p.size_bytes.sum())
    short = replace(p, memory=np.full(4, size // 10))
    assert wanted_nodes(short).nodes in (10, 11)
    assert "memory" in wanted_nodes(short).reason
    twice = replace(p, memory=np.full(4, size * 10), replicas=3)
    assert wanted_nodes(twice).nodes == 3
    assert "replica" in wanted_nodes(twice).reason


def test_nothing_to_measure_by() -> None:
    p = problem(3, 2)
    none = {k: getattr(p, k)[:0] for k in ("memory", "max_rank", "domain", "speed", "node_base")}
    assert wanted_nodes(replace(p, **none, node_ids=[])).nodes == 1
    rows = ("size_bytes", "rank", "prefill", "decode", "adapter_base")
    empty = replace(p, **{k: getattr(p, k)[:0] for k in rows}, adapter_ids=[])
    assert wanted_nodes(empty).nodes == 0
