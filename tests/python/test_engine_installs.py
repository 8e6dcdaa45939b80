"""Adapters are written into pages beside the steps: what may happen meanwhile."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from oracle.checkpoints import SPECS
from oracle.store import OracleStore

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.errors import LoraServeError, NotFoundError, UnavailableError

NAME = "llama"
TIMEOUT_S = 60.0
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
PROMPT = [7 * i % SPECS[NAME].vocab for i in range(20)]


def open_engine(store: OracleStore, **options: Any) -> Engine:
    return Engine(EngineConfig(model=store.checkpoint(NAME), weight_dtype="float32", **options))


@pytest.fixture
def engine(store: OracleStore) -> Iterator[Engine]:
    with open_engine(store) as engine:
        yield engine


def wait_until(condition: Any) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_loaded_adapter_is_brought_into_pages_while_there_are_free_ones(
    store: OracleStore,
) -> None:
    """So its first request need not wait. What does not fit waits for requests or for a hint."""
    directories = store.adapters(NAME)
    with open_engine(store, memory_bytes=1_300_000) as engine:
        for name, directory in directories.items():
            engine.load_adapter(name, directory)
        wait_until(lambda: engine.stats().adapters_installed >= 2)
        name = min(set(directories) - engine.installed())  # not all of them fit
        engine.prefetch(name)
        wait_until(lambda: name in engine.installed())
        before = engine.stats().adapter_waits
        assert len(engine.submit(PROMPT, GREEDY, name).result(TIMEOUT_S).token_ids) == 4
        assert engine.stats().adapter_waits == before
        with pytest.raises(NotFoundError):
            engine.prefetch("unknown")


def test_waits_for_adapters_are_counted(store: OracleStore) -> None:
    with open_engine(store, prefetch=False) as engine:
        engine.load_adapter("a", store.adapters(NAME)["r128"])
        for _ in range(3):
            engine.submit(PROMPT, GREEDY, "a").result(TIMEOUT_S)
        engine.submit(PROMPT, GREEDY).result(TIMEOUT_S)
        stats = engine.stats()
        assert (stats.adapter_waits, stats.adapter_installs) == (1, 1)
        assert 0 < stats.adapter_wait_seconds < TIMEOUT_S


def test_unloading_while_it_is_written(engine: Engine, store: OracleStore) -> None:
    """Whether the install or the unloading ends first, its pages come back and the name is free."""
    free = engine.stats().pages_free
    for round_ in range(20):
        engine.load_adapter("a", store.adapters(NAME)["r128"])
        handle = engine.submit(PROMPT, GREEDY, "a")
        if round_ % 2:
            handle.abort()
        engine.unload_adapter("a", TIMEOUT_S)
        assert len(handle.result(TIMEOUT_S).token_ids) == 4 or round_ % 2
        with pytest.raises(NotFoundError):
            engine.submit(PROMPT, GREEDY, "a")
    wait_until(lambda: engine.stats().pages_adapter == 0)
    stats = engine.stats()
    assert stats.pages_free + stats.pages_kv == free
    assert stats.adapters_installing == stats.adapters_installed == 0
    assert engine.installed() == frozenset()


def test_aborting_what_waits_for_its_adapter(engine: Engine, store: OracleStore) -> None:
    """It ends at once, the others that wait for the adapter get their answers."""
    engine.load_adapter("a", store.adapters(NAME)["r128"])
    kept = [engine.submit(PROMPT, GREEDY, "a") for _ in range(3)]
    aborted = [engine.submit(PROMPT, GREEDY, "a") for _ in range(3)]
    for handle in aborted:
        handle.abort()
    assert {handle.result(TIMEOUT_S).finish_reason for handle in aborted} <= {"cancelled", "length"}
    assert {len(handle.result(TIMEOUT_S).token_ids) for handle in kept} == {4}


def test_a_deadline_that_passes_while_the_adapter_is_written(
    engine: Engine, store: OracleStore
) -> None:
    for directory in store.adapters(NAME).values():
        engine.load_adapter("a", directory, replace=True)
        late = engine.submit(PROMPT, GREEDY, "a", timeout_s=1e-6)
        with pytest.raises(LoraServeError) as caught:
            late.result(TIMEOUT_S)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        assert len(engine.submit(PROMPT, GREEDY, "a").result(TIMEOUT_S).token_ids) == 4


def test_closing_while_adapters_are_written(store: OracleStore) -> None:
    """It takes no longer than a step and a part of an adapter; who waits is told."""
    for _ in range(5):
        engine = open_engine(store)
        handles = []
        for name, directory in store.adapters(NAME).items():
            engine.load_adapter(name, directory)
            handles.append(engine.submit(PROMPT, GREEDY, name))
        unloading = threading.Thread(target=engine.unload_adapter, args=("r128",))
        unloading.start()
        engine.close()
        unloading.join(TIMEOUT_S)
        assert not unloading.is_alive()
        for handle in handles:
            with contextlib.suppress(UnavailableError):
                assert len(handle.result(TIMEOUT_S).token_ids) == 4


def test_more_adapters_than_fit_are_all_served(store: OracleStore) -> None:
    """Room for a few of them; every request ends, and with the tokens of a roomy engine."""
    names = list(store.adapters(NAME))
    answers: dict[bool, list[list[int]]] = {}
    for roomy in (True, False):
        memory = None if roomy else 1_300_000
        with open_engine(store, memory_bytes=memory, max_sequences=4) as engine:
            for name in names:
                engine.load_adapter(name, store.adapters(NAME)[name])
            handles = [
                engine.submit(PROMPT[turn:], GREEDY, name) for turn in range(6) for name in names
            ]
            answers[roomy] = [list(handle.result(TIMEOUT_S).token_ids) for handle in handles]
            stats = engine.stats()
            assert (stats.adapter_evictions == 0) == roomy
            assert stats.adapter_installs >= len(names)
            assert stats.adapter_install_seconds > 0
    assert answers[True] == answers[False]
