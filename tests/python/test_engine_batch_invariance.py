"""A request's answer is bitwise the same alone, batched, chunked, preempted and resumed."""

import itertools
import random
import time
from dataclasses import dataclass
from typing import Any

import pytest
from oracle.adapters import ADAPTERS
from oracle.checkpoints import SPECS
from oracle.comparison import compare
from oracle.store import OracleStore

from loraserve import Engine, EngineConfig, SamplingParams

NAME = "qwen3"
TOLERANCE = 1e-4
REQUESTS = 24
ROOMY = 256 << 20  # bytes; far more than everything together needs
SHARED_PREFIX = 70  # tokens; four full KV blocks and a bit
TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Wanted:
    prompt: list[int]
    adapter: str | None
    params: SamplingParams


def make_requests() -> list[Wanted]:
    """24 requests over the base and 8 adapters; those of one adapter share a prefix.

    Every third one samples, with a seed of its own; half ask for the prompt's log-probabilities,
    which a prefix-cache hit cannot give, so the others are the ones that hit.
    """
    rng = random.Random(24)
    vocab = SPECS[NAME].vocab
    names: list[str | None] = [None, *ADAPTERS]
    prefixes = {n: [rng.randrange(vocab) for _ in range(SHARED_PREFIX)] for n in names}
    requests = []
    for i in range(REQUESTS):
        adapter = names[i % len(names)]
        own = [rng.randrange(vocab) for _ in range(rng.choice((1, 5, 30, 120, 200)))]
        sampled = i % 3 == 0
        params = SamplingParams(
            max_tokens=rng.choice((8, 24, 48)),
            temperature=1.0 if sampled else 0.0,
            top_p=0.9 if i % 6 == 0 else 1.0,
            seed=1000 + i if sampled else None,
            ignore_eos=True,
            logprobs=2,
            prompt_logprobs=i % 2 == 0,
        )
        # One in four has nothing to share: short prompts keep decoding beside long prefills.
        prompt = own if i % 4 == 3 else prefixes[adapter] + own
        requests.append(Wanted(prompt, adapter, params))
    return requests


REQUESTS_IN_ORDER = make_requests()


def open_engine(store: OracleStore, **options: Any) -> Engine:
    engine = Engine(EngineConfig(model=store.checkpoint(NAME), weight_dtype="float32", **options))
    for adapter, directory in store.adapters(NAME).items():
        engine.load_adapter(adapter, directory)
    return engine


def bits(answer: Any) -> tuple[Any, ...]:
    """All that must be equal: Python compares the floats exactly."""
    return (
        list(answer.token_ids),
        list(answer.logprobs),
        [dict(top) for top in answer.top_logprobs],
        None if answer.prompt_logprobs is None else list(answer.prompt_logprobs),
        answer.finish_reason,
    )


def run_batch(engine: Engine, seed: int) -> list[Any]:
    """Submits all requests in a random order; the answers in the order of REQUESTS_IN_ORDER."""
    order = list(range(REQUESTS))
    random.Random(seed).shuffle(order)
    handles = {}
    for i in order:
        wanted = REQUESTS_IN_ORDER[i]
        handles[i] = engine.submit(wanted.prompt, wanted.params, adapter=wanted.adapter)
    return [handles[i].result(timeout_s=TIMEOUT_S) for i in range(REQUESTS)]


def assert_same(answers: list[Any], alone: list[Any], where: str) -> None:
    for i, (answer, single) in enumerate(zip(answers, alone, strict=True)):
        wanted = REQUESTS_IN_ORDER[i]
        assert bits(answer) == bits(single), (
            f"{where}: request {i} ({wanted.adapter}, prompt of {len(wanted.prompt)}) differs "
            "from its own single run"
        )


@pytest.fixture(scope="module")
def alone(store: OracleStore) -> list[Any]:
    """Each request run by itself: nothing cached, whole prompts in one step."""
    with open_engine(store, prefix_cache=False, max_batch_tokens=512) as engine:
        answers = [
            engine.submit(w.prompt, w.params, adapter=w.adapter).result(timeout_s=TIMEOUT_S)
            for w in REQUESTS_IN_ORDER
        ]
        assert engine.stats().prefix_hit_tokens == 0
        assert engine.stats().preemptions == 0
    return answers


def test_single_runs_meet_the_oracle(store: OracleStore, alone: list[Any]) -> None:
    """With the other tests here, so does every batched run: its numbers are the same bits."""
    reference = store.reference(NAME)
    for i, (answer, wanted) in enumerate(zip(alone, REQUESTS_IN_ORDER, strict=True)):
        assert len(answer.token_ids) == wanted.params.max_tokens
        one = compare(
            answer,
            reference,
            wanted.prompt,
            wanted.adapter,
            tolerance=TOLERANCE,
            greedy=wanted.params.temperature == 0.0,
            top=2,
        )
        assert one.agrees(TOLERANCE), f"request {i}: {one}"


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (1, {"max_batch_tokens": 512, "prefix_cache": False}),
        (2, {"max_batch_tokens": 7, "max_sequences": 5}),
        (3, {"max_batch_tokens": 33, "threads": 1}),
        (4, {"max_batch_tokens": 64, "threads": 3}),
        (5, {"max_batch_tokens": 130, "max_step_adapter_bytes": 3_000_000}),
        (6, {"max_batch_tokens": 256, "max_sequences": 24}),
    ],
)
def test_batched_in_chunks(
    store: OracleStore, alone: list[Any], seed: int, options: dict[str, Any]
) -> None:
    with open_engine(store, memory_bytes=ROOMY, **options) as engine:
        assert_same(run_batch(engine, seed), alone, str(options))


def test_with_prefix_cache_hits(store: OracleStore, alone: list[Any]) -> None:
    """The second round finds what the first left; adapters never share a prefix."""
    with open_engine(store, memory_bytes=ROOMY, max_batch_tokens=48) as engine:
        assert_same(run_batch(engine, 7), alone, "first round")
        first = engine.stats().prefix_hit_tokens
        assert_same(run_batch(engine, 8), alone, "second round")
        second = engine.stats().prefix_hit_tokens - first
    # At least the requests that want no prompt log-probabilities skip their shared prefix.
    hitting = [w for w in REQUESTS_IN_ORDER if not w.params.prompt_logprobs]
    shared = [w for w in hitting if len(w.prompt) > SHARED_PREFIX]
    assert len(shared) >= 4
    assert second >= len(shared) * (SHARED_PREFIX // 16) * 16


def test_with_preemptions(store: OracleStore, alone: list[Any]) -> None:
    """Room for KV blocks shrinks until sequences are preempted; every size gives the same bits.

    The sizes are found by trying, because pages and the scheduler's order are the engine's affair.
    """
    with open_engine(store, memory_bytes=ROOMY) as engine:
        assert_same(run_batch(engine, 9), alone, "roomy")
        stats = engine.stats()
        total = stats.pages_free + stats.pages_kv + stats.pages_adapter
        adapter_bytes = ROOMY * stats.pages_adapter // total
    spec = SPECS[NAME]
    token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * 4
    tokens = [len(w.prompt) + w.params.max_tokens for w in REQUESTS_IN_ORDER]
    kv_bytes = sum(tokens) * token_bytes
    preempted = hits = tries = 0
    while preempted == 0 or hits == 0:
        kv_bytes = kv_bytes * 7 // 10
        assert kv_bytes > 1.2 * max(tokens) * token_bytes, (
            f"nothing was preempted ({preempted}) or nothing hit the prefix cache ({hits})"
        )
        tries += 1
        with open_engine(
            store, memory_bytes=adapter_bytes + kv_bytes, max_batch_tokens=100
        ) as engine:
            assert_same(run_batch(engine, tries), alone, f"room for {kv_bytes} bytes of KV")
            preempted += engine.stats().preemptions
            hits += engine.stats().prefix_hit_tokens
    print(f"{kv_bytes} bytes of KV: {preempted} preemptions, {hits} prefix-cache tokens")


@pytest.mark.parametrize("step_bytes", [0, 1_500_000])
def test_with_adapter_evictions(store: OracleStore, alone: list[Any], step_bytes: int) -> None:
    """Half the adapters fit at a time: they are evicted and installed again, into other pages,
    while sequences are preempted and prefixes found; every answer keeps its bits.

    Installs go on beside the steps, so what meets what is a matter of time: rounds are run until
    each has been seen.
    """
    with open_engine(store, memory_bytes=ROOMY) as engine:
        run_batch(engine, 10)
        stats = engine.stats()
        adapter_bytes = stats.pages_adapter * stats.page_bytes
    memory = adapter_bytes // 2 + (2 << 20)
    rng = random.Random(99)
    with open_engine(
        store,
        memory_bytes=memory,
        max_batch_tokens=rng.randrange(20, 90),
        max_step_adapter_bytes=step_bytes,
    ) as engine:
        end = time.monotonic() + TIMEOUT_S
        for seed in itertools.count(11):
            assert_same(run_batch(engine, seed), alone, f"{memory} bytes, round {seed}")
            stats = engine.stats()
            seen = {
                "evictions": stats.adapter_evictions,
                "installs again": max(0, stats.adapter_installs - len(ADAPTERS)),
                "preemptions": stats.preemptions,
                "prefix hits": stats.prefix_hit_tokens,
            }
            if seed >= 12 and all(seen.values()):
                break
            assert time.monotonic() < end, seen


def test_with_random_chunk_sizes(store: OracleStore, alone: list[Any]) -> None:
    rng = random.Random(2024)
    for seed in range(20, 26):
        options = {
            "max_batch_tokens": rng.randrange(3, 300),
            "max_sequences": rng.randrange(2, 30),
            "block_size": rng.choice((16, 32, 48)),
            "threads": rng.choice((1, 2)),
        }
        with open_engine(store, memory_bytes=ROOMY, **options) as engine:
            assert_same(run_batch(engine, seed), alone, str(options))


def test_sampling_depends_on_the_seed(store: OracleStore) -> None:
    """The bitwise tests would mean little if sampling ignored its seed or its distribution."""
    with open_engine(store) as engine:
        params = [
            SamplingParams(max_tokens=24, temperature=1.0, seed=s, ignore_eos=True, logprobs=0)
            for s in (1, 1, 2)
        ]
        first, again, other = engine.generate([[5, 6, 7]] * 3, params)
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids
