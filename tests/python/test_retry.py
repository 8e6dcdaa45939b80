"""When a request is sent again, and after how long."""

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve import errors
from loraserve.client.retry import (
    RetryBudget,
    RetryPolicy,
    RetryState,
    another_may,
    node_is_lost,
)
from loraserve.errors import (
    CancelledError,
    LoraServeError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)

LOST = UnavailableError("rpc", "gone")
FULL = ResourceExhaustedError("requests", "full", 0.3)
POLICY = RetryPolicy(max_attempts=3, max_resumes=4, budget_reserve=2, first_backoff_s=1.0)


def state(policy: RetryPolicy = POLICY) -> RetryState:
    return RetryState(policy, RetryBudget(policy))


def fruitless(
    made: RetryState, error: LoraServeError = LOST, started: bool = False
) -> float | None:
    return made.after(error, progress=False, started=started)


def fruitful(made: RetryState, error: LoraServeError = LOST) -> float | None:
    return made.after(error, progress=True, started=True)


def test_attempts_without_a_token_are_bounded_and_wait_longer_each_time() -> None:
    made = state()
    assert [fruitless(made) for _ in range(3)] == [0.0, 1.0, None]
    assert made.attempt == 2
    patient = state(replace(POLICY, max_attempts=6))
    assert [fruitless(patient) for _ in range(6)] == [0.0, 1.0, 2.0, 4.0, 8.0, None]
    assert fruitless(state(replace(POLICY, max_attempts=1))) is None


def test_a_token_starts_the_count_again_and_only_resumes_are_bounded_then() -> None:
    made = state()
    assert [fruitful(made) for _ in range(5)] == [0.0, 0.0, 0.0, 0.0, None]
    assert made.attempt == 4
    # A whole row of attempts without a token after one with.
    again = state(replace(POLICY, max_resumes=9))
    assert [fruitless(again) for _ in range(2)] == [0.0, 1.0]
    assert fruitful(again) == 0.0
    assert [fruitless(again, started=True) for _ in range(3)] == [0.0, 1.0, None]
    # To go on is no retry.
    assert fruitful(state(replace(POLICY, max_attempts=1))) == 0.0


def test_resumes_that_bring_nothing_count_too() -> None:
    made = state(replace(POLICY, max_attempts=9, max_resumes=3))
    assert fruitful(made) is not None
    assert fruitless(made, started=True) is not None
    assert fruitless(made, started=True) is not None
    assert fruitless(made, started=True) is None


def test_a_full_node_is_asked_again_when_it_said_within_the_budget() -> None:
    budget = RetryBudget(POLICY)

    def refused() -> float | None:
        return fruitless(RetryState(POLICY, budget), FULL)

    assert [refused() for _ in range(3)] == [0.3, 0.3, None]
    # A lost node is not what the budget is for.
    assert fruitless(RetryState(POLICY, budget), LOST) == 0.0


def test_the_time_a_node_names_is_kept_however_often() -> None:
    made = state()
    assert fruitless(made, FULL) == 0.3
    assert fruitless(made, ResourceExhaustedError("requests", "full", 0.0)) == 0.0
    assert made.attempt == 2


def test_a_retry_that_is_not_made_takes_nothing_from_the_budget() -> None:
    policy = replace(POLICY, max_attempts=1)
    budget = RetryBudget(policy)
    for _ in range(5):
        assert fruitless(RetryState(policy, budget), FULL) is None
    assert [budget.take() for _ in range(3)] == [True, True, False]


def test_ten_requests_earn_one_retry_and_no_more_than_the_reserve_is_saved() -> None:
    budget = RetryBudget(POLICY)
    for _ in range(1000):
        budget.request()
    assert [budget.take() for _ in range(3)] == [True, True, False]
    for _ in range(9):
        budget.request()
    assert not budget.take()
    budget.request()
    assert budget.take()
    assert not budget.take()


def test_every_request_counts_for_the_budget_once() -> None:
    budget = RetryBudget(POLICY)
    while budget.take():
        pass
    for _ in range(10):
        made = RetryState(POLICY, budget)
        fruitless(made, LOST)
    assert budget.take()
    assert not budget.take()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), max_size=300), st.integers(0, 5), st.sampled_from([0.0, 0.1, 0.5]))
def test_retries_never_exceed_reserve_and_ratio(
    events: list[bool], reserve: int, ratio: float
) -> None:
    budget = RetryBudget(RetryPolicy(budget_reserve=reserve, budget_ratio=ratio))
    requests = retries = 0
    for is_request in events:
        if is_request:
            budget.request()
            requests += 1
        elif budget.take():
            retries += 1
        assert retries <= reserve + ratio * requests + 1e-6


def _made(kind: type[LoraServeError], field: str) -> LoraServeError:
    return kind(field, "message")


def every_error() -> list[type[LoraServeError]]:
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    return [c for c in found if issubclass(c, LoraServeError)]


@pytest.mark.parametrize("kind", every_error(), ids=lambda k: k.__name__)
def test_only_what_another_node_may_cure_is_tried_again(kind: type[LoraServeError]) -> None:
    for field, transport in (("node", False), ("adapter", False), ("rpc", True)):
        error = _made(kind, field)
        curable = issubclass(kind, UnavailableError) or (
            transport and kind in (LoraServeError, CancelledError)
        )
        assert another_may(error) == curable
        assert (fruitless(state(), error) is not None) == curable
        assert (fruitful(state(), error) is not None) == curable


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (UnavailableError("node", "drains"), True),
        (UnavailableError("stream", "tokens are missing"), True),
        (UnavailableError("rpc", "connection refused"), True),
        (LoraServeError("rpc", "stream removed"), True),
        (LoraServeError("server", "internal error"), False),
        (CancelledError("rpc", "by the server"), True),
        (CancelledError("attempt", "replaced"), False),
        (UnavailableError("adapter", "could not be loaded here"), False),
        (FULL, False),
        (NotFoundError("adapter", "unknown"), False),
    ],
    ids=str,
)
def test_an_error_about_one_adapter_is_not_the_loss_of_its_node(
    error: LoraServeError, lost: bool
) -> None:
    assert node_is_lost(error) == lost


@pytest.mark.parametrize("step", [fruitless, fruitful])
def test_an_error_that_is_final_counts_no_attempt(
    step: Callable[[RetryState, LoraServeError], float | None],
) -> None:
    made = state()
    assert step(made, NotFoundError("adapter", "unknown")) is None
    assert step(made, ResourceExhaustedError("prompt", "never fits")) is None
    assert made.attempt == 0


@pytest.mark.parametrize("policy", [RetryPolicy(), POLICY, RetryPolicy(1, 0, 0)])
def test_the_unluckiest_request_is_sent_as_often_as_the_policy_says(policy: RetryPolicy) -> None:
    made = state(policy)
    while fruitless(made) is not None:
        pass
    assert made.attempt == policy.max_attempts - 1
    made = state(policy)
    for _ in range(policy.max_attempts - 1):
        assert fruitless(made) is not None
    while made.redirected():
        pass
    while made.after(LOST, progress=True, started=True) is not None:
        pass
    # One more where the name turns out to mean another revision, which is not this class's to see.
    assert made.attempt + 1 == policy.most_attempts - 1
