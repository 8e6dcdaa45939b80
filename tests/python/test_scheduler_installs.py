"""Adapters on their way into pages: who runs meanwhile, and for whom pages are kept."""

from scheduler_steps import next_step, ran, warm

from loraserve._testing import PageUse, Scheduler


def loading(scheduler: Scheduler, pages: tuple[int, ...]) -> None:
    """Adapters 1, 2, ... of so many pages, and a request for each."""
    for adapter, size in enumerate(pages, 1):
        scheduler.add_adapter(adapter, size)
        scheduler.add(adapter, [1], max_tokens=9, adapter=adapter)


def test_bytes_under_way_are_limited_but_for_the_largest() -> None:
    scheduler = Scheduler(64, max_install_bytes=4 * 4096)
    loading(scheduler, (1, 2, 9, 1, 3, 3))
    scheduler.step()
    assert scheduler.installing == [1, 2, 3, 4]
    scheduler.end_install(3)  # now 2 is the largest, beside 1 and 1
    scheduler.step()
    assert scheduler.installing == [1, 2, 4, 5]
    scheduler.end_install(2)
    scheduler.step()
    assert scheduler.installing == [1, 4, 5]
    scheduler.end_install(1)
    scheduler.step()
    assert scheduler.installing == [4, 5, 6]


def test_a_large_adapter_under_way_does_not_hold_up_small_ones() -> None:
    pages = (200 << 20) // 4096
    scheduler = Scheduler(4 * pages)
    loading(scheduler, (pages, 100, 100, pages))
    scheduler.step()
    assert scheduler.installing == [1, 2, 3]


def test_requests_run_beside_an_install_and_join_once_it_is_done() -> None:
    scheduler = Scheduler(64)
    scheduler.add_adapter(1, 3)
    scheduler.add(1, [1], max_tokens=6)
    scheduler.add(2, [1], max_tokens=6, adapter=1)
    scheduler.add(3, [1], max_tokens=6)
    for _ in range(3):
        assert ran(scheduler.step()) == [1, 3]
    assert scheduler.installing == [1]
    scheduler.end_install(1)
    assert ran(scheduler.step()) == [1, 3, 2]


def test_an_install_that_nobody_needs_is_given_up() -> None:
    """Its pages are free, and it is gone, when the installer has let go of them and not before."""
    for unload_first in (True, False):
        scheduler = Scheduler(8)
        scheduler.add_adapter(1, 5)
        scheduler.add(1, [1], adapter=1)
        scheduler.step()
        if unload_first:
            scheduler.remove_adapter(1)
        assert scheduler.take_unneeded() == []
        assert scheduler.take(1)
        if not unload_first:
            assert scheduler.take_unneeded() == []  # it may be asked for again
            scheduler.remove_adapter(1)
        assert scheduler.take_unneeded() == [1]
        assert scheduler.take_removed() == []
        assert scheduler.pages(PageUse.ADAPTER) == 5
        scheduler.end_install(1, complete=not unload_first)
        assert scheduler.take_removed() == [1]
        assert scheduler.pages(PageUse.FREE) == 8


def test_what_was_installed_for_a_request_is_kept_for_it() -> None:
    """Adapter 1 is there for request 2, which waits for a place; 3, which came later, may not have
    its pages for adapter 2, and a request of the base none for its prompt."""
    scheduler = Scheduler(8, max_sequences=1, prefix_cache=False)
    scheduler.add_adapter(1, 4)
    scheduler.add_adapter(2, 4)
    scheduler.add(1, [1], max_tokens=5)
    scheduler.add(2, [1], max_tokens=1, adapter=1)
    scheduler.add(3, [1], max_tokens=1, adapter=2)
    started: list[int] = []
    finished: list[int] = []
    while scheduler.waiting or scheduler.running:
        step = next_step(scheduler)
        started += [adapter for adapter, _ in step.started]
        finished += step.finished
        assert 2 in finished or not step.evicted
    assert (started, finished) == ([1, 2], [1, 2, 3])


def test_who_goes_first_may_take_what_is_kept_for_those_behind() -> None:
    scheduler = Scheduler(8, max_sequences=1, prefix_cache=False)
    scheduler.add_adapter(1, 4)
    scheduler.add_adapter(2, 4)
    scheduler.add(1, [1], max_tokens=5)
    scheduler.add(2, [1], adapter=1)
    scheduler.step()
    next_step(scheduler)
    scheduler.add(3, [1], adapter=2, priority=1)
    step = scheduler.step()
    assert (step.evicted, [i for i, _ in step.started]) == ([1], [2])
    finished: list[int] = []
    while scheduler.waiting or scheduler.running:
        finished += next_step(scheduler).finished
    assert finished == [1, 3, 2]


def test_a_running_request_waits_for_pages_that_are_being_written() -> None:
    """Alone and short of a block, it cannot preempt anybody: it goes on after the install, whose
    adapter makes way for it."""
    scheduler = Scheduler(5, prefix_cache=False)
    scheduler.add_adapter(1, 2)
    scheduler.add(1, [1] * 30, max_tokens=34)
    scheduler.step()
    scheduler.add(2, [1], adapter=1)
    while ran(scheduler.step()):
        assert scheduler.installing == [1]
    scheduler.end_install(1)
    step = scheduler.step()
    assert (ran(step), step.evicted) == ([1], [1])
    finished: list[int] = []
    while scheduler.waiting or scheduler.running:
        finished += next_step(scheduler).finished
    assert finished == [1, 2]


def test_a_prefetch_takes_free_pages_and_comes_after_what_is_asked_for() -> None:
    scheduler = Scheduler(10, prefix_cache=False)
    for adapter, pages in ((1, 4), (2, 4), (3, 4), (4, 1)):
        scheduler.add_adapter(adapter, pages)
        scheduler.prefetch(adapter)
    scheduler.add(1, [1], adapter=2)
    started = []
    for _ in range(6):
        step = next_step(scheduler)
        assert not step.evicted
        started += [adapter for adapter, _ in step.started]
    assert started == [2, 1, 4]  # 3 found no place
    scheduler.remove_adapter(1)
    next_step(scheduler)
    assert scheduler.installing == []  # and is forgotten


def test_a_prefetch_may_take_the_place_of_what_nobody_uses() -> None:
    scheduler = Scheduler(10, prefix_cache=False)
    for adapter in (1, 2, 3):
        scheduler.add_adapter(adapter, 4)
    warm(scheduler, 1, 2)
    scheduler.add(1, [1], max_tokens=9, adapter=1)
    scheduler.step()
    scheduler.prefetch(3, evict=True)
    step = scheduler.step()
    assert (step.evicted, [i for i, _ in step.started]) == ([2], [3])
    scheduler.add(2, [1], max_tokens=9, adapter=3)
    next_step(scheduler)
    scheduler.prefetch(2, evict=True)
    assert [scheduler.step().evicted for _ in range(3)] == [[], [], []]  # all in use: forgotten


def test_an_unloaded_adapter_is_not_prefetched() -> None:
    scheduler = Scheduler(10)
    scheduler.add_adapter(1, 4)
    scheduler.prefetch(1)
    scheduler.remove_adapter(1)
    scheduler.prefetch(7)
    assert scheduler.step().started == []
    assert scheduler.take_removed() == [1]


def used(scheduler: Scheduler, *adapters: int) -> None:
    for adapter in adapters:
        warm(scheduler, adapter)


def test_eviction_weighs_recency_cost_and_use() -> None:
    """Where a byte costs the same everywhere, the longest unused goes; a fixed cost spares small
    adapters, and use spares those that are asked for often, for a while."""

    def evicted(install: float, byte: float, uses: list[int]) -> int:
        scheduler = Scheduler(11, prefix_cache=False)
        scheduler.set_costs(0.0, install, byte)
        for adapter, pages in ((1, 2), (2, 4), (3, 4), (4, 2)):
            scheduler.add_adapter(adapter, pages)
        used(scheduler, *uses)
        scheduler.add(1, [1], adapter=4)
        return int(scheduler.step().evicted[0])

    assert evicted(0.0, 1e-9, [1, 2, 3]) == 1
    assert evicted(0.0, 1e-9, [1, 2, 3, 1]) == 2
    assert evicted(1.0, 0.0, [1, 2, 3]) == 2
    assert evicted(0.0, 1e-9, [1, 1, 2, 3]) == 2


def test_a_dear_adapter_that_nobody_uses_goes_in_the_end() -> None:
    scheduler = Scheduler(9, prefix_cache=False)
    scheduler.set_costs(0.0, 1.0, 0.0)
    scheduler.add_adapter(1, 2)  # dear: the same cost for half the pages
    for adapter in range(2, 12):
        scheduler.add_adapter(adapter, 4)
    used(scheduler, 1)
    evicted: list[int] = []
    for adapter in range(2, 12):
        scheduler.add(adapter, [1], adapter=adapter)
        while scheduler.waiting:
            evicted += next_step(scheduler).evicted
    assert 1 in evicted[1:]


def test_cached_blocks_and_adapters_go_by_what_they_cost() -> None:
    """One page of prefix cache, idle for longer than an adapter of one page: the cheaper goes."""
    for prefill, first in ((1.0, True), (1e-9, False)):
        scheduler = Scheduler(4)
        scheduler.set_costs(prefill, 0.0, 1e-6)
        scheduler.add_adapter(1, 2)
        scheduler.add_adapter(2, 2)
        scheduler.add(1, [1] * 17)
        scheduler.step()
        used(scheduler, 1)
        scheduler.add(2, [1], adapter=2)
        assert (scheduler.step().evicted == [1]) == first
