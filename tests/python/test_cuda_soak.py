"""Thousands of steps of the CUDA engine while adapters come, change and go: every answer is the one
of its own revision, and nothing is left behind. On the emulation for a few seconds."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
from backend_fixtures import open_backend
from oracle.checkpoints import SPECS
from oracle.store import OracleStore

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.errors import NotFoundError

NAME = "llama"
NAMES = [f"tenant-{i}" for i in range(6)]
STEPS = {"cuda-emulated": 60, "cuda": 10_000}
MEMORY_BYTES = 7 << 18  # all adapters in pages would be 3.3 MiB: they evict each other
CLIENTS = 6
# A prompt's log-probabilities depend a little on who is computed beside it, as products of other
# sizes add in another order; those of other adapters are further away than twice this.
TOLERANCE = 0.35
TIMEOUT_S = 300.0
PROMPT = [(37 * i + 5) % SPECS[NAME].vocab for i in range(12)]
PARAMS = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, prompt_logprobs=True)

Expected = dict[str | None, list[float]]  # by revision


def furthest(found: list[float], expected: list[float]) -> float:
    """Of two answers' log-probabilities of the prompt."""
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def expected_answers(engine: Engine, store: OracleStore) -> Expected:
    """Of each revision alone, all loaded, and so some evicted; they are unloaded again."""
    names = store.adapters(NAME)
    revisions = {name: engine.load_adapter(name, path) for name, path in names.items()}
    answers: Expected = {}
    for name in (None, *names):
        (done,) = engine.generate([PROMPT], PARAMS, adapters=[name])
        assert done.revision == (revisions[name] if name else None)
        answers[done.revision] = list(done.prompt_logprobs or [])[1:]
    for name in names:
        engine.unload_adapter(name, TIMEOUT_S)
    return answers


class Soak:
    """Threads that ask and a thread that changes adapters, until so many steps are done."""

    def __init__(self, engine: Engine, store: OracleStore, expected: Expected) -> None:
        self.engine, self.expected = engine, expected
        self.sources = list(store.adapters(NAME).values())
        self.stop = threading.Event()
        self.seen: Counter[str | None] = Counter()
        self.changes = 0
        self.errors: list[BaseException] = []

    def run(self, steps: int) -> None:
        threads = [
            threading.Thread(target=self._guarded, args=(work, seed))
            for seed, work in enumerate([self._change, *[self._ask] * CLIENTS])
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + TIMEOUT_S
        goal = self.engine.stats().steps + steps
        while self.engine.stats().steps < goal and not self.stop.wait(0.01):
            assert time.monotonic() < end, self.engine.stats()
        self.stop.set()
        for thread in threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]

    def _guarded(self, work: Callable[[random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not self.stop.is_set():
                work(rng)
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def _ask(self, rng: random.Random) -> None:
        name = rng.choice([None, *NAMES])
        try:
            handle = self.engine.submit(PROMPT, PARAMS, name)
        except NotFoundError:  # it is away just now
            self.stop.wait(0.001)
            return
        if rng.random() < 0.1:
            handle.abort()
        done = handle.result(TIMEOUT_S)
        if done.finish_reason == "cancelled":
            return
        assert len(done.token_ids) == PARAMS.max_tokens
        away = furthest(list(done.prompt_logprobs or [])[1:], self.expected[done.revision])
        assert away < TOLERANCE, (name, away)
        self.seen[done.revision] += 1

    def _change(self, rng: random.Random) -> None:
        name, source = rng.choice(NAMES), rng.choice(self.sources)
        if rng.random() < 0.3 and name in {load.name for load in self.engine.adapters()}:
            self.engine.unload_adapter(name, TIMEOUT_S)
        else:
            self.engine.load_adapter(name, source, replace=True)
        self.changes += 1
        self.stop.wait(0.005)


@pytest.mark.parametrize("device", ["cuda-emulated", "cuda"])
def test_answers_stay_right_and_pages_come_back(store: OracleStore, device: str) -> None:
    open_backend(device)
    config = EngineConfig(
        model=store.checkpoint(NAME),
        device=device,
        memory_bytes=MEMORY_BYTES,
        max_batch_tokens=48,
        max_sequences=4,
        prefix_cache=False,
    )
    with Engine(config) as engine:
        fresh = engine.stats()
        expected = expected_answers(engine, store)
        for a in expected:
            for b in expected:
                assert a == b or furthest(expected[a], expected[b]) > 2 * TOLERANCE
        soak = Soak(engine, store, expected)
        soak.run(STEPS[device])
        assert len(soak.seen) > 1, soak.seen
        assert soak.changes > 0

        for load in engine.adapters():
            engine.unload_adapter(load.name, TIMEOUT_S)
        again = expected_answers(engine, store)
        assert again.keys() == expected.keys()
        assert all(furthest(again[r], expected[r]) < TOLERANCE for r in expected)
        left = engine.stats()
        assert left.adapter_evictions > 0
        assert (left.running, left.waiting, left.adapters_installed) == (0, 0, 0)
        assert (left.pages_adapter, left.pages_kv) == (0, 0)
        assert left.pages_free == fresh.pages_free
