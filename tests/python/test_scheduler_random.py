"""Random walks of the scheduler: whatever comes, a model checks each step."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_steps import ran

from loraserve._testing import PageUse, Scheduler, StatusError

BLOCK = 16


class SchedulerMachine(RuleBasedStateMachine):
    """Any arrivals, cancellations and adapters come and go, installs end when they like; a model
    checks each step."""

    PAGES, SEQUENCES, BUDGET, INSTALL_PAGES = 14, 5, 24, 4

    def __init__(self) -> None:
        super().__init__()
        self.next = 1
        self.prompts: dict[int, list[int]] = {}
        self.wanted: dict[int, int] = {}
        self.adapter_of: dict[int, int] = {}
        self.done: dict[int, int] = {}  # positions computed since the last (re)start
        self.outputs: dict[int, int] = {}
        self.pages_of: dict[int, list[int]] = {}  # of adapters that are, or are being, installed
        self.installing: set[int] = set()
        self.sizes: dict[int, int] = {}
        self.draining: set[int] = set()

    @initialize(
        per_block=st.sampled_from([1, 2]),
        cache=st.booleans(),
        limit=st.booleans(),
        costs=st.tuples(*[st.sampled_from([0.0, 1e-3, 1.0])] * 3),
    )
    def start(
        self, per_block: int, cache: bool, limit: bool, costs: tuple[float, float, float]
    ) -> None:
        self.per_block = per_block
        self.scheduler = Scheduler(
            self.PAGES,
            pages_per_block=per_block,
            max_batch_tokens=self.BUDGET,
            max_sequences=self.SEQUENCES,
            max_install_bytes=self.INSTALL_PAGES * 4096,
            max_step_adapter_bytes=6 * 4096 if limit else 0,
            max_overtakes=3,
            prefix_cache=cache,
        )
        self.scheduler.set_costs(*costs)

    @precondition(lambda self: len(self.sizes) < 5)
    @rule(pages=st.integers(1, 7))
    def load(self, pages: int) -> None:
        self.scheduler.add_adapter(self.next, pages)
        self.sizes[self.next] = pages
        self.next += 1

    @rule(adapter=st.integers(0, 30), evict=st.booleans())
    def prefetch(self, adapter: int, evict: bool) -> None:
        self.scheduler.prefetch(adapter, evict)

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
            assert adapter not in self.installing
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

    @precondition(lambda self: self.installing)
    @rule(data=st.data())
    def end_install(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(sorted(self.installing)))
        for unneeded in self.scheduler.take_unneeded():
            assert unneeded in self.draining
        complete = adapter not in self.draining or data.draw(st.booleans())
        self.installing.discard(adapter)
        if not complete:
            del self.pages_of[adapter]
        self.scheduler.end_install(adapter, complete)
        self.forget_removed()

    @rule()
    def step(self) -> None:
        step = self.scheduler.step()
        for adapter in step.evicted:
            assert adapter not in self.installing
            assert adapter not in {self.adapter_of[r] for r in ran(step)}
            del self.pages_of[adapter]
        for adapter, pages in step.started:
            assert adapter not in self.pages_of
            assert len(pages) == self.sizes[adapter]
            self.pages_of[adapter] = pages
            self.installing.add(adapter)
        under_way = [self.sizes[adapter] for adapter in self.installing]
        assert sum(under_way) - max(under_way, default=0) <= self.INSTALL_PAGES
        assert sum(item[2] for item in step.items) <= self.BUDGET
        assert len(step.items) <= self.SEQUENCES
        assert step.items or self.installing or not self.prompts, "all wait, for nothing"
        for request, begin, count, samples in step.items:
            self.check_item(step, request, begin, count, samples)
        for request in step.finished:
            assert self.outputs[request] == self.wanted[request]
            self.end(request)
        self.forget_removed()

    def check_item(self, step: Any, request: int, begin: int, count: int, samples: bool) -> None:
        adapter = self.adapter_of[request]
        ready = adapter in self.pages_of and adapter not in self.installing
        assert adapter == 0 or ready, "runs without its adapter"
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
                for adapter in sorted(self.installing):
                    self.installing.discard(adapter)
                    self.scheduler.end_install(adapter)
                self.forget_removed()
                self.step()
            pytest.fail("does not come to an end")


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
