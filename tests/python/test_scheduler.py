"""The scheduler alone, against its promises: budgets, pages, order, and that nobody starves."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraserve._testing import PageUse, Scheduler, StatusError

BLOCK = 16


def ran(step: Any) -> list[int]:
    return [item[0] for item in step.items]


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
    scheduler = Scheduler(10)
    scheduler.add_adapter(1, 7)
    scheduler.add_adapter(2, 7)
    scheduler.add(1, [1], max_tokens=3, adapter=1)
    scheduler.add(2, [2], max_tokens=1, adapter=2)
    scheduler.add(3, [3], max_tokens=1)
    assert ran(scheduler.step()) == [1, 3]
    assert ran(scheduler.step()) == [1]
    assert scheduler.step().finished == [1]
    last = scheduler.step()
    assert last.finished == [2]
    assert (last.evicted, [i for i, _ in last.installed]) == ([1], [2])


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
    for request, adapter in ((1, 1), (2, 2), (3, 3), (4, 1), (5, 0)):
        scheduler.add(request, [request], max_tokens=1, adapter=adapter)
    assert ran(scheduler.step()) == [1, 2, 4, 5]
    assert ran(scheduler.step()) == [3]
    scheduler.add(6, [1], adapter=4)  # alone, the largest fits
    assert ran(scheduler.step()) == [6]


def test_installations_of_one_step_are_limited() -> None:
    scheduler = Scheduler(64, max_step_installs=2)
    for adapter in range(1, 6):
        scheduler.add_adapter(adapter, 1)
        scheduler.add(adapter, [1], max_tokens=4, adapter=adapter)
    assert [len(scheduler.step().installed) for _ in range(4)] == [2, 2, 1, 0]


def test_bytes_installed_in_one_step_are_limited() -> None:
    """Small adapters come together, large ones one by one, and one beyond the limit alone."""
    scheduler = Scheduler(64, max_step_install_bytes=4 * 4096)
    for adapter, pages in enumerate((1, 2, 1, 3, 3, 9), 1):
        scheduler.add_adapter(adapter, pages)
        scheduler.add(adapter, [1], max_tokens=9, adapter=adapter)
    installed = [[adapter for adapter, _ in scheduler.step().installed] for _ in range(5)]
    assert installed == [[1, 2, 3], [4], [5], [6], []]


def test_large_adapters_are_installed_one_in_a_step_unless_told_otherwise() -> None:
    pages = (20 << 20) // 4096
    for options, expected in (({}, [1, 1, 1]), ({"max_step_install_bytes": 0}, [3, 0, 0])):
        scheduler = Scheduler(4 * pages, **options)
        for adapter in (1, 2, 3):
            scheduler.add_adapter(adapter, pages)
            scheduler.add(adapter, [1], max_tokens=9, adapter=adapter)
        assert [len(scheduler.step().installed) for _ in range(3)] == expected


def started(scheduler: Scheduler, hot: dict[str, Any]) -> list[int]:
    """Requests in the order in which they start, while two more of `hot` come in every step."""
    seen: list[int] = []
    for number in range(100, 300, 2):
        for request in (number, number + 1):
            scheduler.add(request, [5], max_tokens=2 + request % 4, **hot)
        seen += [r for r in ran(scheduler.step()) if r not in seen]
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
    assert (scheduler.running, scheduler.waiting) == (sequences, 2)
    scheduler.add(50, [2], max_tokens=2, adapter=2)
    order = [request for request in started(scheduler, hot) if request >= 50]
    assert 50 in order
    # It is promoted between two steps, so one step's worth of others may come in addition.
    assert order.index(50) <= overtakes + sequences


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
    for request, deadline in ((1, 0.0), (2, 5.0), (3, 9.0)):
        scheduler.add(request, [1], deadline=deadline)
    assert scheduler.expired(4.9) == []
    assert scheduler.expired(5.0) == [2]
    assert sorted(scheduler.expired(99.0)) == [2, 3]


class SchedulerMachine(RuleBasedStateMachine):
    """Any arrivals, cancellations and adapters come and go; a model checks each step."""

    PAGES, SEQUENCES, BUDGET, INSTALLS = 14, 5, 24, 2

    def __init__(self) -> None:
        super().__init__()
        self.next = 1
        self.prompts: dict[int, list[int]] = {}
        self.wanted: dict[int, int] = {}
        self.adapter_of: dict[int, int] = {}
        self.done: dict[int, int] = {}  # positions computed since the last (re)start
        self.outputs: dict[int, int] = {}
        self.pages_of: dict[int, list[int]] = {}  # of installed adapters
        self.sizes: dict[int, int] = {}
        self.draining: set[int] = set()

    @initialize(per_block=st.sampled_from([1, 2]), cache=st.booleans(), limit=st.booleans())
    def start(self, per_block: int, cache: bool, limit: bool) -> None:
        self.per_block = per_block
        self.scheduler = Scheduler(
            self.PAGES,
            pages_per_block=per_block,
            max_batch_tokens=self.BUDGET,
            max_sequences=self.SEQUENCES,
            max_step_installs=self.INSTALLS,
            max_step_adapter_bytes=6 * 4096 if limit else 0,
            max_overtakes=3,
            prefix_cache=cache,
        )

    @precondition(lambda self: len(self.sizes) < 5)
    @rule(pages=st.integers(1, 7))
    def load(self, pages: int) -> None:
        self.scheduler.add_adapter(self.next, pages)
        self.sizes[self.next] = pages
        self.next += 1

    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        loaded = sorted(set(self.sizes) - self.draining)
        if loaded:
            adapter = data.draw(st.sampled_from(loaded))
            self.scheduler.remove_adapter(adapter)
            self.draining.add(adapter)
            self.forget_removed()

    def forget_removed(self) -> None:
        for adapter in self.scheduler.take_removed():
            assert adapter in self.draining
            assert adapter not in self.adapter_of.values()
            self.draining.discard(adapter)
            self.pages_of.pop(adapter, None)
            del self.sizes[adapter]

    @rule(
        data=st.data(),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=60),
        outputs=st.integers(1, 20),
        priority=st.integers(0, 2),
    )
    def submit(self, data: st.DataObject, tokens: list[int], outputs: int, priority: int) -> None:
        adapter = data.draw(st.sampled_from([0, *sorted(set(self.sizes) - self.draining)]))
        request, self.next = self.next, self.next + 1
        blocks = -(-(len(tokens) + outputs) // BLOCK)
        fits = blocks * self.per_block + self.sizes.get(adapter, 0) <= self.PAGES
        try:
            self.scheduler.add(request, tokens, outputs, adapter, priority)
        except StatusError:
            assert not fits
            return
        assert fits
        self.prompts[request], self.wanted[request] = tokens, outputs
        self.adapter_of[request] = adapter
        self.done[request] = self.outputs[request] = 0

    def end(self, request: int) -> None:
        for table in (self.prompts, self.wanted, self.adapter_of, self.done, self.outputs):
            del table[request]

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.prompts)))
        assert self.scheduler.take(request)
        assert not self.scheduler.take(request)
        self.end(request)
        self.forget_removed()

    @rule()
    def step(self) -> None:
        step = self.scheduler.step()
        for adapter in step.evicted:
            del self.pages_of[adapter]
        for adapter, pages in step.installed:
            assert adapter not in self.pages_of
            assert len(pages) == self.sizes[adapter]
            self.pages_of[adapter] = pages
        assert len(step.installed) <= self.INSTALLS
        assert sum(item[2] for item in step.items) <= self.BUDGET
        assert len(step.items) <= self.SEQUENCES
        assert step.items or not self.prompts, "somebody waits and nothing runs"
        for request, begin, count, samples in step.items:
            self.check_item(step, request, begin, count, samples)
        for request in step.finished:
            assert self.outputs[request] == self.wanted[request]
            self.end(request)
        self.forget_removed()

    def check_item(self, step: Any, request: int, begin: int, count: int, samples: bool) -> None:
        adapter = self.adapter_of[request]
        assert adapter == 0 or adapter in self.pages_of, "runs without its adapter"
        length = len(self.prompts[request]) + self.outputs[request]
        # Goes on, or was preempted and starts again, perhaps behind a cached prefix.
        assert begin == self.done[request] or begin % BLOCK == 0
        assert count > 0
        assert begin + count <= length
        assert samples == (begin + count == length)
        self.done[request] = begin + count
        self.outputs[request] += samples
        pages = step.pages[request]
        assert len(set(pages)) == len(pages) >= -(-(begin + count) // BLOCK) * self.per_block
        assert not set(pages) & {p for own in self.pages_of.values() for p in own}

    @invariant()
    def pages_add_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        pages = {use: self.scheduler.pages(use) for use in (PageUse.FREE, PageUse.KV)}
        held = sum(self.sizes[adapter] for adapter in self.pages_of)
        assert self.scheduler.pages(PageUse.ADAPTER) == held
        assert sum(pages.values()) + held == self.PAGES
        assert self.scheduler.running + self.scheduler.waiting == len(self.prompts)

    def teardown(self) -> None:
        """Whatever is left ends in bounded time."""
        if hasattr(self, "scheduler"):
            for _ in range(4000):
                if not self.prompts:
                    return
                self.step()
            pytest.fail("does not come to an end")


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
