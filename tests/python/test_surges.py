"""When demand has left the plan behind: single adapters, and ranks whose adapters grow together."""

import numpy as np
import pytest
from placement_makers import model

from loraserve.controller.settings import Settings
from loraserve.controller.surges import Surges
from loraserve.placement.columns import Columns
from loraserve.placement.types import AdapterId, AdapterSpec, Demand

COUNT = 100
SETTINGS = Settings()
SECONDS = SETTINGS.burst_check_ticks * SETTINGS.tick_seconds
LOAD = model()
SPECS = [
    AdapterSpec(AdapterId("t", "base", f"a{i}"), "r", 1 << 20, (8, 64)[i % 2]) for i in range(COUNT)
]
BY_ID = {s.adapter: s for s in SPECS}


def columns(rate: float) -> Columns:
    whole = np.full(COUNT, 1 << 20)
    rank = np.array([s.max_rank for s in SPECS])
    one = np.ones(1, np.int64)
    return Columns(
        whole,
        rank,
        np.full(COUNT, rate),
        np.full(COUNT, rate),
        one << 40,
        0 * one,
        0 * one,
        np.ones(1),
        [s.adapter for s in SPECS],
        ["n"],
        np.zeros(COUNT, np.int64),
        np.zeros(1, np.int64),
        load=LOAD,
    )


@pytest.fixture
def rate() -> float:
    """Tokens/s of each adapter, of both kinds, at which a rank's adapters are half a node."""
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        p = columns(middle)
        low, high = (middle, high) if p.alone[p.rank == 64].sum() < 0.5 else (low, middle)
    return low


def planned(rate: float) -> Surges:
    surges = Surges(SETTINGS, LOAD, BY_ID.get)
    surges.plan({s.adapter: Demand(rate, rate) for s in SPECS}, columns(rate))
    return surges


def ask(surges: Surges, rank: int, tokens: float) -> None:
    for spec in SPECS:
        if spec.max_rank == rank:
            surges.count(spec.adapter, tokens, tokens)


def test_what_was_planned_for_is_no_surge(rate: float) -> None:
    surges = planned(rate)
    assert not surges.found()
    for rank in (8, 64):
        ask(surges, rank, 1.3 * rate * SECONDS)
    assert not surges.found()


@pytest.mark.parametrize("rank", [8, 64])
def test_a_rank_that_doubles_is_one_though_no_adapter_is(rate: float, rank: int) -> None:
    surges = planned(rate)
    ask(surges, rank, 2.5 * rate * SECONDS)
    assert surges.found()
    surges.take()
    assert not surges.found()


def test_a_rank_that_is_next_to_nothing_may_double(rate: float) -> None:
    surges = planned(rate / 100)
    ask(surges, 64, 3 * rate / 100 * SECONDS)
    assert not surges.found()


def test_an_adapter_that_was_idle_is_one(rate: float) -> None:
    surges = planned(0.0)
    surges.count(SPECS[1].adapter, 100 * rate * SECONDS, 100 * rate * SECONDS)
    assert surges.found()


def test_an_adapter_that_nobody_registered_is_none(rate: float) -> None:
    surges = planned(0.0)
    surges.count(AdapterId("t", "base", "gone"), 1e9, 1e9)
    assert not surges.found()
    surges.forget(AdapterId("t", "base", "gone"))
    assert not surges.take()
