"""The demand tracker: smoothing, headroom, priors, rubbish, and what idle adapters cost."""

import math
import random
from collections.abc import Mapping
from typing import Any

import pytest
from fuzz_budget import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar_demand import ScalarDemand

from loraserve.placement.demand import FLOOR, DemandTracker, bursts
from loraserve.placement.types import AdapterId, Demand


def adapter(name: str) -> AdapterId:
    return AdapterId("t", "base", name)


A, B = adapter("a"), adapter("b")


def started() -> DemandTracker:
    tracker = DemandTracker()
    assert not tracker.close_window(0.0)
    return tracker


def test_rates_are_smoothed() -> None:
    tracker = started()
    tracker.add(A, 600, 200)
    tracker.add(A, 0, 100)
    assert tracker.close_window(10.0)
    assert tracker.rates[A] == Demand(pytest.approx(48.0), pytest.approx(24.0))
    assert tracker.close_window(20.0)
    assert tracker.rates[A].prefill == pytest.approx(0.2 * 48)


def test_hot_adapters_get_their_mean_absolute_deviation() -> None:
    tracker = started()
    tokens, forecast, deviation = [1000, 3000, 500, 2500], 0.0, 0.0
    for second, count in enumerate(tokens, 1):
        tracker.add(A, count, 0)
        tracker.close_window(float(second))
        deviation = 0.8 * abs(count - forecast) + 0.2 * deviation
        forecast = 0.8 * count + 0.2 * forecast
    assert tracker.rates[A].prefill == pytest.approx(forecast)
    assert tracker.demand()[A].prefill == pytest.approx(forecast + deviation)


def test_cold_adapters_get_no_headroom() -> None:
    tracker = started()
    tracker.admit(A, 8)
    tracker.admit(B, 16)
    for second in (1.0, 2.0):
        tracker.add(A, 100_000, 0)
        tracker.add(B, 10 * second, 0)
        tracker.close_window(second)
    assert tracker.demand()[B] == tracker.rates[B]
    assert tracker.demand()[A].prefill > tracker.rates[A].prefill


def test_a_new_adapter_is_given_the_mean_of_its_rank_for_two_windows() -> None:
    tracker = started()
    for name, rank in (("a", 8), ("b", 8), ("c", 64)):
        tracker.admit(adapter(name), rank)
    for name, tokens in (("a", 300), ("b", 100), ("c", 5000)):
        tracker.add(adapter(name), tokens, 0)
    tracker.close_window(1.0)
    tracker.admit(adapter("new8"), 8)
    tracker.admit(adapter("new16"), 16)
    assert tracker.demand()[adapter("new8")].prefill == pytest.approx(0.8 * 400 / 2)
    assert tracker.demand()[adapter("new16")].prefill == pytest.approx(0.8 * 5400 / 4)
    tracker.close_window(2.0)
    assert adapter("new8") in tracker.demand()
    tracker.close_window(3.0)
    assert adapter("new8") not in tracker.demand()


def test_a_used_adapter_has_no_prior_and_a_forgotten_one_nothing() -> None:
    tracker = started()
    tracker.admit(A, 8)
    tracker.admit(B, 8)
    tracker.add(A, 100, 0)
    tracker.close_window(1.0)
    assert tracker.demand()[A].prefill == pytest.approx(80 * 2)  # with headroom
    tracker.forget(A)
    tracker.forget(B)
    assert tracker.demand() == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1, 1e300])
def test_rubbish_is_ignored_and_counted(bad: float) -> None:
    tracker = started()
    tracker.add(A, 100, 100)
    tracker.add(A, bad, 1)
    tracker.add(A, 1, bad)
    assert tracker.ignored == 2
    tracker.close_window(1.0)
    assert tracker.rates[A] == Demand(80, 80)


@pytest.mark.parametrize("bad", [5.0, 4.0, -1.0, math.nan, math.inf])
def test_a_clock_that_does_not_rise_is_ignored_and_counted(bad: float) -> None:
    tracker = started()
    tracker.close_window(5.0)
    tracker.add(A, 100, 0)
    assert not tracker.close_window(bad)
    assert tracker.ignored == 1
    assert tracker.close_window(6.0)
    assert tracker.rates[A].prefill == pytest.approx(80.0)


def test_idle_adapters_share_what_newcomers_get() -> None:
    """Of 1000 adapters that are wanted alike, half are asked in a window: the next window's tokens
    go to the other half as well."""
    tracker, asked, left = started(), 500, 500
    for i in range(asked + left):
        tracker.admit(adapter(f"a{i}"), 8)
    tracker.close_window(1.0)
    tracker.close_window(2.0)  # none is new any more
    for i in range(asked):
        tracker.add(adapter(f"a{i}"), 100, 0, requests=1 if i % 2 else 2)
    tracker.close_window(3.0)
    idle = tracker.idle()
    # The tokens of those asked once are half of all.
    total = sum(r.prefill for r in tracker.demand().values()) + left * idle[8].prefill
    assert left * idle[8].prefill == pytest.approx(0.5 * total)
    assert total == pytest.approx(0.8 * asked * 100)
    # When nobody new comes, idle ones get nothing.
    for second in range(4, 12):
        for i in range(asked):
            tracker.add(adapter(f"a{i}"), 100, 0)
        tracker.close_window(float(second))
    assert tracker.idle() == {}


def test_a_shift_between_ranks_is_followed_at_once() -> None:
    """Though each adapter alone has too few requests to be believed."""
    tracker = started()
    for i in range(200):
        tracker.admit(adapter(f"a{i}"), 8 if i < 100 else 64)
    for second in range(1, 21):
        for i in range(200):
            tracker.add(adapter(f"a{i}"), (100 if second < 20 or i < 100 else 300), 0)
        tracker.close_window(float(second))
    large = [r.prefill for a, r in tracker.rates.items() if int(a.name[1:]) >= 100]
    assert sum(large) == pytest.approx(100 * (0.8 * 300 + 0.2 * 100), rel=0.01)


def test_idle_adapters_cost_nothing() -> None:
    tracker = started()
    for i in range(1000):
        tracker.admit(adapter(f"a{i}"), 8)
        tracker.add(adapter(f"a{i}"), 1000, 0)
    for second in range(1, 40):
        tracker.add(A, 1000, 0)
        tracker.close_window(float(second))
    assert tracker._rates.adapters == [A]
    assert not tracker._new
    assert FLOOR < 0.1


def test_bursts_are_those_far_over_the_plan() -> None:
    planned = {A: Demand(10, 0), B: Demand(100, 0)}
    c, d = adapter("c"), adapter("d")
    now = {A: Demand(30, 20), B: Demand(300, 0), c: Demand(0, 5), d: Demand(0, 0.5)}
    assert bursts(now, planned) == [A, c]


def test_a_short_window_says_little_of_single_adapters() -> None:
    """Five seconds in which a few of many adapters happen to be asked change none of them much; an
    adapter that is asked far more than it can be by chance is believed."""
    tracker = DemandTracker(60.0)
    tracker.close_window(0.0)
    for minute in range(1, 9):
        for i in range(200):
            tracker.admit(adapter(f"a{i}"), 8)
            tracker.add(adapter(f"a{i}"), 400, 0, requests=4)
        tracker.close_window(60.0 * minute)
    calm = tracker.rates[adapter("a0")].prefill
    assert calm == pytest.approx(400 / 60, rel=0.01)
    for i in range(66):
        tracker.add(adapter(f"a{i}"), 100, 0, requests=1)
    tracker.add(adapter("a199"), 100 * 60, 0, requests=60)
    tracker.close_window(485.0)
    rates = {a.name: r.prefill for a, r in tracker.rates.items()}
    few = [rates[f"a{i}"] for i in range(66)]
    none = [rates[f"a{i}"] for i in range(66, 199)]
    assert max(few) < 1.2 * min(none)
    assert rates["a199"] > 20 * min(none)


def test_a_prior_lasts_two_usual_windows() -> None:
    tracker = DemandTracker(60.0)
    tracker.close_window(0.0)
    tracker.admit(A, 8)
    tracker.admit(B, 8)
    tracker.add(B, 1000, 0)
    for end in (60.0, 65.0, 70.0):
        tracker.add(B, 1000, 0)
        tracker.close_window(end)
        assert A in tracker.demand()
    for end in (130.0, 190.0):
        tracker.add(B, 1000, 0)
        tracker.close_window(end)
    assert A not in tracker.demand()


_WHO = st.integers(0, 11).map(lambda i: adapter(f"a{i}"))
_TOKENS = st.one_of(st.just(0), st.integers(1, 30), st.integers(1000, 100_000))
_STEPS = st.one_of(
    st.tuples(st.just("admit"), _WHO, st.sampled_from([4, 8, 64])),
    st.tuples(st.just("forget"), _WHO),
    st.tuples(st.just("add"), _WHO, _TOKENS, _TOKENS, st.sampled_from([None, 0, 1, 2, 40])),
    st.tuples(st.just("add"), _WHO, _TOKENS, _TOKENS, st.sampled_from([None, 1])),
    st.tuples(st.just("close"), st.sampled_from([60.0, 60.0, 5.0, 0.5, 300.0])),
)


def same(found: Mapping[Any, Demand], wanted: Mapping[Any, Demand]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[key] == pytest.approx(wanted[key], rel=1e-9, abs=1e-12) for key in wanted
    )


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(_STEPS, min_size=5, max_size=80), st.sampled_from([0.0, 60.0]))
def test_columns_say_what_each_adapter_alone_would(
    steps: list[tuple[Any, ...]], window_s: float
) -> None:
    fast, slow = DemandTracker(window_s), ScalarDemand(window_s)
    now = 0.0
    for name, *arguments in [("close", 1.0), *steps, ("close", 60.0)]:
        if name == "close":
            now += arguments[0]
            arguments, name = [now], "close_window"
        for tracker in (fast, slow):
            getattr(tracker, name)(*arguments)
        assert same(fast.rates, slow.rates)
        assert same(fast.idle(), slow.idle())
        assert same(fast.demand(), slow.demand())


def test_columns_say_the_same_of_many_adapters() -> None:
    pick = random.Random(5)
    fast, slow = DemandTracker(60.0), ScalarDemand(60.0)
    names = [adapter(f"a{i}") for i in range(3000)]
    for window in range(6):
        for tracker in (fast, slow):
            tracker.close_window(60.0 * window)
        for name in pick.sample(names, 200):
            rank = pick.choice([8, 16, 128])
            for tracker in (fast, slow):
                tracker.admit(name, rank)
        for name in pick.sample(names, 50):
            for tracker in (fast, slow):
                tracker.forget(name)
        for name in pick.choices(names, [1 / (i + 1) for i in range(len(names))], k=5000):
            tokens = pick.randrange(1, 2000), pick.randrange(500)
            for tracker in (fast, slow):
                tracker.add(name, *tokens)
        assert same(fast.demand(), slow.demand())
        assert same(fast.idle(), slow.idle())
    assert len(fast.demand()) > 1000
