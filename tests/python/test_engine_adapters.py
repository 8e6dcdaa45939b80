"""Adapters come, change and go while requests run; every answer is the one of its own revision."""

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle.checkpoints import SPECS
from oracle.store import OracleStore
from safetensors.torch import load_file

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.checkpoint.bounded_json import parse_object
from loraserve.checkpoint.packed_adapter import pack, write_packed
from loraserve.checkpoint.peft_adapter import read_peft_directory
from loraserve.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    LoraServeError,
    NotFoundError,
    UnavailableError,
)

NAME = "llama"
TIMEOUT_S = 120.0
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=0)
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
# A prefix of several KV blocks, so that a stale one would be found and be wrong.
PROMPTS = [[7 * i % SPECS[NAME].vocab for i in range(70)] + [end] for end in range(4)]


def open_engine(store: OracleStore, **options: Any) -> Engine:
    return Engine(EngineConfig(model=store.checkpoint(NAME), weight_dtype="float32", **options))


@pytest.fixture
def engine(store: OracleStore) -> Iterator[Engine]:
    with open_engine(store) as engine:
        yield engine


def bits(answer: Any) -> tuple[list[int], list[float]]:
    return list(answer.token_ids), list(answer.logprobs)


def wait_for_idle(engine: Engine) -> None:
    end = time.monotonic() + TIMEOUT_S
    while engine.stats().running + engine.stats().waiting:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture(scope="module")
def expected(store: OracleStore) -> dict[tuple[str | None, int], Any]:
    """(revision, prompt) to what that revision answers, from an engine that never changes."""
    answers = {}
    with open_engine(store, prefix_cache=False) as engine:
        names: list[str | None] = [None, *store.adapters(NAME)]
        for name in names:
            revision = engine.load_adapter(name, store.adapters(NAME)[name]) if name else None
            for i, answer in enumerate(engine.generate(PROMPTS, GREEDY, [name] * len(PROMPTS))):
                assert answer.revision == revision
                answers[revision, i] = bits(answer)
    assert len({str(answer) for answer in answers.values()}) == len(answers)
    return answers


class Clients:
    """Threads that ask for adapters by name, over and over, and check every answer."""

    def __init__(self, engine: Engine, expected: dict[tuple[str | None, int], Any]) -> None:
        self.engine, self.expected = engine, expected
        self.stop = threading.Event()
        self.seen: Counter[str | None] = Counter()
        self.refused: Counter[str] = Counter()
        self.failures: list[str] = []
        self.lock = threading.Lock()

    def run(self, name: str | None) -> None:
        for i in itertools.cycle(range(len(PROMPTS))):
            if self.stop.is_set():
                return
            try:
                answer = self.engine.submit(PROMPTS[i], GREEDY, name).result(TIMEOUT_S)
            except (NotFoundError, UnavailableError) as error:
                with self.lock:
                    self.refused[f"{name} {error.field}"] += 1
                continue
            except Exception as error:
                with self.lock:
                    self.failures.append(repr(error))
                return
            with self.lock:
                self.seen[answer.revision] += 1
                if bits(answer) != self.expected[answer.revision, i]:
                    self.failures.append(f"{name} answered wrongly as {answer.revision}")
                    return


@pytest.mark.parametrize("memory_bytes", [64 << 20, 1_300_000])
def test_adapters_change_under_load(
    store: OracleStore, expected: dict[tuple[str | None, int], Any], memory_bytes: int
) -> None:
    """Two names, one replaced and one unloaded again and again under five threads of requests; in
    little memory installed adapters are evicted and requests preempted besides."""
    directories = list(store.adapters(NAME).values())
    with open_engine(store, memory_bytes=memory_bytes, max_batch_tokens=96) as engine:
        clients = Clients(engine, expected)
        replaced = [engine.load_adapter("replaced", directories[0])]
        names = [None, "replaced", "replaced", "unloaded", "unloaded"]
        threads = [threading.Thread(target=clients.run, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        try:
            for round_ in range(24):
                directory = directories[round_ % len(directories)]
                replaced.append(engine.load_adapter("replaced", directory, replace=True))
                engine.load_adapter("unloaded", directories[(3 * round_ + 1) % len(directories)])
                before, answered = sum(clients.seen.values()), clients.seen[replaced[-1]]
                end = time.monotonic() + TIMEOUT_S
                while not clients.failures and (
                    sum(clients.seen.values()) < before + 12
                    or clients.seen[replaced[-1]] == answered
                ):
                    assert time.monotonic() < end
                    time.sleep(0.002)
                engine.unload_adapter("unloaded", timeout_s=TIMEOUT_S)
        finally:
            clients.stop.set()
            for thread in threads:
                thread.join(TIMEOUT_S)
        assert not clients.failures
        wait_for_idle(engine)
        stats = engine.stats()
        assert set(replaced) <= set(clients.seen), "a revision was never asked"
        assert clients.seen[None] > 0
        assert set(clients.refused) <= {"unloaded adapter"}
        assert stats.prefix_hit_tokens > 0
        if memory_bytes < 10 << 20:
            # Not all fit: asked for in turn, they make room for each other.
            for _ in range(2):
                for load in engine.adapters():
                    engine.generate([PROMPTS[0]], GREEDY, [load.name])
            assert engine.stats().adapter_evictions > 0
        engine.unload_adapter("replaced", timeout_s=TIMEOUT_S)
        assert engine.adapters() == []
        assert engine.stats().pages_adapter == engine.stats().adapter_weight_bytes == 0


def test_unloading_lets_what_runs_end(engine: Engine, store: OracleStore) -> None:
    engine.load_adapter("a", store.adapters(NAME)["r8"])
    handles = [engine.submit([1, 2, 3 + i], LONG, "a") for i in range(24)]
    with pytest.raises(DeadlineExceededError) as caught:
        engine.unload_adapter("a", timeout_s=0.001)
    assert caught.value.field == "timeout_s"
    with pytest.raises(NotFoundError):
        engine.submit([1], GREEDY, "a")
    # The name is free at once; the old load drains beside the new one.
    engine.load_adapter("a", store.adapters(NAME)["r16"])
    for handle in handles:
        assert len(handle.result(TIMEOUT_S).token_ids) == 400
    engine.unload_adapter("a", timeout_s=TIMEOUT_S)
    assert engine.stats().pages_adapter == 0


def test_unloading_that_took_too_long_can_be_waited_for_again(
    engine: Engine, store: OracleStore
) -> None:
    """So whoever owns the weights' memory knows when it is not read any more."""
    engine.load_adapter("a", store.adapters(NAME)["r8"])
    handles = [engine.submit([1, 2, 3 + i], LONG, "a") for i in range(24)]
    for _ in range(2):
        with pytest.raises(DeadlineExceededError):
            engine.unload_adapter("a", timeout_s=0.001)
    engine.unload_adapter("a", timeout_s=TIMEOUT_S)
    for handle in handles:
        assert len(handle.result(TIMEOUT_S).token_ids) == 400
    with pytest.raises(NotFoundError):
        engine.unload_adapter("a", timeout_s=TIMEOUT_S)


def test_a_request_ends_on_the_revision_it_began_with(
    engine: Engine, store: OracleStore, expected: dict[tuple[str | None, int], Any]
) -> None:
    old = engine.load_adapter("a", store.adapters(NAME)["r8"])
    running = engine.submit(PROMPTS[0], LONG, "a")
    assert engine.submit(PROMPTS[1], GREEDY, "a").result(TIMEOUT_S).revision == old
    new = engine.load_adapter("a", store.adapters(NAME)["r16"], replace=True)
    assert new != old
    # The same prefix under the new revision: nothing of the old one's cache may be used.
    answer = engine.submit(PROMPTS[0], GREEDY, "a").result(TIMEOUT_S)
    assert (answer.revision, answer.cached_tokens) == (new, 0)
    assert bits(answer) == expected[new, 0]
    ended = running.result(TIMEOUT_S)
    assert ended.revision == old
    assert list(ended.token_ids[:6]) == expected[old, 0][0]
    assert len(ended.token_ids) == 400
    again = engine.load_adapter("a", store.adapters(NAME)["r8"], replace=True)
    assert again == old
    assert bits(engine.submit(PROMPTS[2], GREEDY, "a").result(TIMEOUT_S)) == expected[old, 2]


@pytest.mark.parametrize("adapter", ["r17", "r16", "r64"])  # float32, bfloat16, float16
def test_every_way_to_hand_over_an_adapter(
    engine: Engine,
    store: OracleStore,
    expected: dict[tuple[str | None, int], Any],
    tmp_path: Path,
    adapter: str,
) -> None:
    """A directory, a packed file, tensors of torch and arrays of numpy give one revision."""
    directory = store.adapters(NAME)[adapter]
    source = read_peft_directory(directory)
    packed = tmp_path / "packed.lora"
    write_packed(source, packed)
    tensors = load_file(directory / "adapter_model.safetensors")
    config_bytes = (directory / "adapter_config.json").read_bytes()
    config = parse_object("adapter_config.json", config_bytes, 1 << 20)
    revision = engine.load_adapter("directory", directory)
    assert engine.load_adapter("file", packed) == revision
    assert engine.load_adapter("torch", tensors, config) == revision
    if adapter != "r16":  # numpy has no bfloat16
        arrays = {name: np.asfortranarray(tensor.numpy()) for name, tensor in tensors.items()}
        assert engine.load_adapter("numpy", arrays, config) == revision
    assert packed.read_bytes() == pack(source)
    for load in engine.adapters():
        assert (
            bits(engine.submit(PROMPTS[3], GREEDY, load.name).result(TIMEOUT_S))
            == (expected[revision, 3])
        )
    with pytest.raises(LoraServeError) as caught:
        engine.load_adapter("no config", tensors)
    assert caught.value.field == "config"


def test_loading_again_changes_nothing(engine: Engine, store: OracleStore) -> None:
    revision = engine.load_adapter("a", store.adapters(NAME)["r8"])
    (before,) = engine.adapters()
    assert engine.load_adapter("a", store.adapters(NAME)["r8"], replace=True) == revision
    assert engine.adapters() == [before]


class Between:
    """The C++ engine, with something done just before a call of `method` goes on."""

    def __init__(self, native: Any, method: str, act: Any) -> None:
        self._native, self._method, self._act = native, method, act

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._native, name)
        if name != self._method:
            return found

        def call(*args: Any) -> Any:
            self._act()
            return found(*args)

        return call


def test_a_replacement_in_the_middle_of_a_submission(engine: Engine, store: OracleStore) -> None:
    """The request was given the old load; the engine must not let that go before it has come."""
    old = engine.load_adapter("a", store.adapters(NAME)["r8"])
    replacer = threading.Thread(
        target=engine.load_adapter,
        args=("a", store.adapters(NAME)["r16"]),
        kwargs={"replace": True},
    )
    native: Any = engine._native

    def replace_now() -> None:
        replacer.start()
        replacer.join(0.3)

    engine._native = Between(native, "submit", replace_now)  # type: ignore[assignment]
    handle = engine.submit([1, 2], GREEDY, "a")
    engine._native = native
    answer = handle.result(TIMEOUT_S)
    assert (answer.revision, len(answer.token_ids)) == (old, 6)
    replacer.join(TIMEOUT_S)
    assert engine.submit([1, 2], GREEDY, "a").result(TIMEOUT_S).revision != old


def test_requests_do_not_wait_for_an_adapter_that_loads(engine: Engine, store: OracleStore) -> None:
    """Event loops submit: what takes as long as a step must not keep them."""
    engine.load_adapter("a", store.adapters(NAME)["r8"])
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(2 * TIMEOUT_S)

    table: Any = engine._table
    table._engine = Between(table._engine, "add_adapter", hold)
    loader = threading.Thread(target=engine.load_adapter, args=("b", store.adapters(NAME)["r16"]))
    loader.start()
    assert entered.wait(TIMEOUT_S)
    for name in ("a", None):
        assert len(engine.submit([1, 2], GREEDY, name).result(TIMEOUT_S).token_ids) == 6
    with pytest.raises(NotFoundError):
        engine.submit([1], GREEDY, "b")
    go_on.set()
    loader.join(TIMEOUT_S)
    assert len(engine.submit([1, 2], GREEDY, "b").result(TIMEOUT_S).token_ids) == 6


def test_closing_ends_an_unloading_that_waits(store: OracleStore) -> None:
    engine = open_engine(store)
    for name in ("a", "b"):
        engine.load_adapter(name, store.adapters(NAME)["r8"])
    engine.submit([1, 2, 3], LONG, "a")
    unloading = threading.Thread(target=engine.unload_adapter, args=("a",))
    unloading.start()
    engine.close()
    unloading.join(TIMEOUT_S)
    assert not unloading.is_alive()
    for change in (
        lambda: engine.unload_adapter("b"),
        lambda: engine.load_adapter("c", store.adapters(NAME)["r8"]),
    ):
        with pytest.raises(UnavailableError) as caught:
            change()
        assert caught.value.field


def test_the_name_of_another_base_is_refused(store: OracleStore, tmp_path: Path) -> None:
    """Where the engine knows its own name; the same weights under another name are the same."""
    directory = store.adapters(NAME)["r8"]
    source = read_peft_directory(directory)
    assert source.base_name
    with open_engine(store, base_name="another/model") as engine:
        with pytest.raises(FailedPreconditionError) as caught:
            engine.load_adapter("a", directory)
        assert caught.value.field == "base"
        assert source.base_name in caught.value.message
        assert "another/model" in caught.value.message
        packed = tmp_path / "packed.lora"
        write_packed(source, packed, base_digest=engine.base_digest)
        engine.load_adapter("same weights", packed)
        engine.load_adapter("allowed", directory, allow_base_mismatch=True)
    with open_engine(store, base_name=source.base_name) as engine:
        engine.load_adapter("a", directory)


def test_the_digest_of_another_base_is_refused(
    engine: Engine, store: OracleStore, tmp_path: Path
) -> None:
    packed = tmp_path / "packed.lora"
    write_packed(read_peft_directory(store.adapters(NAME)["r8"]), packed, base_digest="ab" * 32)
    with pytest.raises(FailedPreconditionError) as caught:
        engine.load_adapter("a", packed)
    assert caught.value.field == "base"
    engine.load_adapter("a", packed, allow_base_mismatch=True)


def test_the_log_says_when_installing_changes_the_dtype(
    store: OracleStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "loraserve.engine"), open_engine(store) as engine:
        for name in ("r16", "r64", "r8"):
            engine.load_adapter(name, store.adapters(NAME)[name])
    assert [record.getMessage() for record in caplog.records] == [
        "adapter r64 is stored as F16 and installed as F32"
    ]


def test_padding_is_reported(store: OracleStore) -> None:
    """The weights of installed adapters against the pages that hold them."""
    with open_engine(store, page_bytes=16384, prefetch=False) as engine:
        engine.load_adapter("a", store.adapters(NAME)["r128"])
        assert engine.stats().adapter_weight_bytes == 0
        engine.generate([[1]], GREEDY, ["a"])
        stats = engine.stats()
        modules = read_peft_directory(store.adapters(NAME)["r128"]).modules
        weights = sum(4 * m.rank * (m.in_features + m.out_features) for m in modules)
        assert stats.adapter_weight_bytes == weights
        assert weights <= stats.pages_adapter * stats.page_bytes <= 1.1 * weights
