"""The scheduler alone, against its promises: budgets, pages, order, and that nobody starves."""

from typing import Any

import pytest
from scheduler_steps import next_step, ran, warm

from loraserve._testing import PageUse, Scheduler, StatusError


def test_decodes_go_before_prefills_and_chunks_fill_the_budget() -> None:
    scheduler = Scheduler(64, max_batch_tokens=20)
    scheduler.add(1, [1] * 4, max_tokens=9)
    assert scheduler.step().items == [(1, 0, 4, True)]
    scheduler.add(2, [2] * 50, max_tokens=1)
    scheduler.add(3, [3] * 10, max_tokens=1)
    assert scheduler.step().items == [(1, 4, 1, True), (2, 0, 19, False)]
    assert scheduler.step().items == [(1, 5, 1, True), (2, 19, 19, False)]
    assert scheduler.step().items == [(1, 6, 1, True), (2, 38, 12, True), (3, 0, 7, False)]
    assert scheduler.step().items == [(1, 7, 1, True), (3, 7, 3, True)]


def test_higher_priority_goes_first_and_then_arrival() -> None:
    scheduler = Scheduler(64, max_sequences=1)
    for request, priority in ((1, 0), (2, 0), (3, 5), (4, -1)):
        scheduler.add(request, [1], priority=priority)
    assert [scheduler.step().finished for _ in range(4)] == [[3], [1], [2], [4]]


def test_a_cold_adapter_does_not_hold_up_others() -> None:
    """All pages but one are pinned by adapter 1, so 2 waits; 3, of the base, does not."""
    scheduler = Scheduler(10, prefix_cache=False)
    scheduler.add_adapter(1, 7)
    scheduler.add_adapter(2, 7)
    warm(scheduler, 1)
    scheduler.add(1, [1], max_tokens=3, adapter=1)
    scheduler.add(2, [2], max_tokens=1, adapter=2)
    scheduler.add(3, [3], max_tokens=1)
    assert ran(scheduler.step()) == [1, 3]
    assert ran(scheduler.step()) == [1]
    assert scheduler.step().finished == [1]
    step = scheduler.step()
    assert (step.evicted, [i for i, _ in step.started]) == ([1], [2])
    assert next_step(scheduler).finished == [2]


def test_a_request_that_lacks_pages_is_not_starved_by_shorter_ones() -> None:
    scheduler = Scheduler(4, prefix_cache=False)
    scheduler.add(1, [1] * 20, max_tokens=12)
    scheduler.step()
    scheduler.add(2, [2] * 40, max_tokens=1)  # three pages, two are free
    scheduler.add(3, [3], max_tokens=1)
    while scheduler.running:
        assert ran(scheduler.step()) == [1]
    assert ran(scheduler.step()) == [2, 3]


def test_the_step_budget_counts_distinct_adapters_once() -> None:
    scheduler = Scheduler(64, max_step_adapter_bytes=2 * 4096)
    for adapter, pages in ((1, 1), (2, 1), (3, 1), (4, 9)):
        scheduler.add_adapter(adapter, pages)
    warm(scheduler, 1, 2, 3, 4)
    for request, adapter in ((1, 1), (2, 2), (3, 3), (4, 1), (5, 0)):
        scheduler.add(request, [request], max_tokens=1, adapter=adapter)
    assert ran(scheduler.step()) == [1, 4, 2, 5]  # those of one adapter together
    assert ran(scheduler.step()) == [3]
    scheduler.add(6, [1], adapter=4)  # alone, the largest fits
    assert ran(scheduler.step()) == [6]


def started(scheduler: Scheduler, hot: dict[str, Any]) -> list[int]:
    """Requests in the order in which they start, while two more of `hot` come in every step."""
    seen: list[int] = []
    for number in range(100, 300, 2):
        for request in (number, number + 1):
            scheduler.add(request, [5], max_tokens=2 + request % 4, **hot)
        seen += [r for r in ran(next_step(scheduler)) if r not in seen]
    return seen


@pytest.mark.parametrize("why", ["pages", "step bytes", "priority"])
def test_nobody_starves(why: str) -> None:
    """Adapter 1 is always in use, and more wait for it than are served: without a bound, the one
    request for adapter 2 would wait for ever."""
    sequences, overtakes = 4, 12
    scheduler = Scheduler(
        10 if why == "pages" else 64,
        max_sequences=sequences,
        max_overtakes=overtakes,
        max_step_adapter_bytes=8 * 4096 if why == "step bytes" else 0,
    )
    scheduler.add_adapter(1, 6)
    scheduler.add_adapter(2, 6)
    hot = {"adapter": 1, "priority": 3 if why == "priority" else 0}
    for request in range(1, 7):
        scheduler.add(request, [5], max_tokens=2 + request, **hot)
    scheduler.step()
    next_step(scheduler)
    assert (scheduler.running, scheduler.waiting) == (sequences, 2)
    scheduler.add(50, [2], max_tokens=2, adapter=2)
    order = [request for request in started(scheduler, hot) if request >= 50]
    assert 50 in order
    # It is promoted between two steps, so one step's worth of others may come in addition.
    assert order.index(50) <= overtakes + sequences


def test_adapters_that_do_not_fit_take_turns_while_others_run() -> None:
    """Two of the three adapters fit and are always asked for. The third gets its turn in the place
    of one, within a quarter of the overtakes that would stop all, and no step is empty."""
    overtakes = 40
    scheduler = Scheduler(24, max_sequences=4, max_overtakes=overtakes, prefix_cache=False)
    for adapter in (1, 2, 3):
        scheduler.add_adapter(adapter, 8)
    warm(scheduler, 1, 2)
    seen: list[int] = []
    asked = 0
    for request in range(100, 400):
        scheduler.add(request, [5], max_tokens=3, adapter=1 + request % 2)
        if request % 2 == 0:
            step = next_step(scheduler)
            assert step.items
            seen += [r for r in ran(step) if r not in seen]
        if request == 131:
            asked, waiting = len(seen), scheduler.waiting
            scheduler.add(50, [2], max_tokens=2, adapter=3)
    assert seen.index(50) - asked <= waiting + overtakes // 4 + 4
    hot = [adapter for adapter in (1, 2) if adapter in {1 + r % 2 for r in seen[-8:]}]
    assert hot == [1, 2], "who made way comes back"


def test_requests_of_one_adapter_go_together_within_their_priority() -> None:
    scheduler = Scheduler(64, max_sequences=3, prefix_cache=False)
    for adapter in (1, 2):
        scheduler.add_adapter(adapter, 1)
    warm(scheduler, 1, 2)
    for request, adapter, priority in (
        *((1, 1, 0), (2, 2, 0), (3, 1, 0), (4, 1, -1), (5, 2, 0), (6, 1, 0), (7, 0, 0), (8, 0, 1)),
    ):
        scheduler.add(request, [request], adapter=adapter, priority=priority)
    assert [ran(scheduler.step()) for _ in range(3)] == [[8, 1, 3], [2, 5, 6], [7, 4]]


def test_a_promoted_request_is_not_the_one_preempted() -> None:
    """It waited long enough: what came later gives way, whatever its priority."""
    scheduler = Scheduler(6, max_sequences=2, max_overtakes=1, prefix_cache=False)
    for request, priority, tokens in ((1, 9, 5), (2, 9, 9), (3, 0, 60), (4, 9, 3), (5, 9, 3)):
        scheduler.add(request, [1], max_tokens=tokens, priority=priority)
    scheduler.add(6, [1], max_tokens=60, priority=9)
    scheduler.add(7, [1], max_tokens=60, priority=9)
    steps, finished = [], []
    while scheduler.running or scheduler.waiting:
        step = scheduler.step()
        steps.append(ran(step))
        finished += step.finished
    assert finished[:4] == [1, 4, 2, 5]
    with_three = [i for i, step in enumerate(steps) if 3 in step]
    assert len(with_three) == 60 == with_three[-1] - with_three[0] + 1
    assert finished[4:] == [3, 6, 7]
    assert scheduler.counters["preemptions"] > 0


def test_preemption_takes_the_last_in_order_and_loses_no_token() -> None:
    scheduler = Scheduler(4, prefix_cache=False)
    for request in (1, 2, 3):
        scheduler.add(request, [request] * 16, max_tokens=30)
    finished = []
    while scheduler.running or scheduler.waiting:
        finished += scheduler.step().finished
    assert finished == [1, 2, 3]
    assert scheduler.counters["preemptions"] > 0
    assert scheduler.pages(PageUse.FREE) == 4


def test_prefixes_are_shared_within_an_adapter_only() -> None:
    scheduler = Scheduler(64)
    scheduler.add_adapter(1, 1)
    prompt = list(range(40))
    scheduler.add(1, prompt)
    scheduler.step()
    scheduler.add(2, prompt)
    assert scheduler.step().items == [(2, 32, 8, True)]
    warm(scheduler, 1)
    scheduler.add(3, prompt, adapter=1)
    assert scheduler.step().items == [(3, 0, 40, True)]
    scheduler.add(4, prompt[:32])  # the last token is computed always
    assert scheduler.step().items == [(4, 16, 16, True)]


def test_what_can_never_run_is_refused() -> None:
    scheduler = Scheduler(8)
    scheduler.add_adapter(1, 5)
    with pytest.raises(StatusError, match="adapter: id 1 is taken"):
        scheduler.add_adapter(1, 5)
    with pytest.raises(StatusError, match="memory_bytes"):
        scheduler.add_adapter(2, 9)
    with pytest.raises(StatusError, match="prompt"):
        scheduler.add(1, [1] * 129)
    with pytest.raises(StatusError, match="prompt"):
        scheduler.add(1, [1] * 40, max_tokens=20, adapter=1)
    with pytest.raises(StatusError, match="adapter: is not loaded"):
        scheduler.add(1, [1], adapter=7)
    scheduler.add(1, [1], max_tokens=5, adapter=1)
    with pytest.raises(StatusError, match="request_id"):
        scheduler.add(1, [1])


def test_a_draining_adapter_goes_with_its_last_request() -> None:
    scheduler = Scheduler(8)
    scheduler.add_adapter(1, 2)
    scheduler.add(1, [1], max_tokens=3, adapter=1)
    scheduler.add(2, [1], max_tokens=1, adapter=1)
    scheduler.step()
    assert next_step(scheduler).finished == [2]
    scheduler.remove_adapter(1)
    with pytest.raises(StatusError, match="being unloaded"):
        scheduler.add(3, [1], adapter=1)
    assert scheduler.take_removed() == []
    assert scheduler.take(1)
    assert scheduler.take_removed() == [1]
    assert scheduler.pages(PageUse.ADAPTER) == 0
    with pytest.raises(StatusError, match="not loaded"):
        scheduler.remove_adapter(1)


def test_deadlines() -> None:
    scheduler = Scheduler(8)
    for request, deadline in ((1, 0.0), (2, 9.0), (3, 5.0)):
        scheduler.add(request, [1], deadline=deadline)
    assert scheduler.expired(4.9) == []
    assert scheduler.expired(5.0) == [3]
    assert scheduler.expired(99.0) == [3, 2]  # the earliest first
    assert scheduler.take(3)
    assert scheduler.expired(99.0) == [2]
