"""What the engine tells of its steps and of its pages."""

import time
from collections.abc import Iterator

import pytest

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.demo import MODEL_DIRECTORY, adapter_directory
from loraserve.engine.stats import StepRecord

PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
PROMPT = list(range(3, 23))
TIMEOUT_S = 60.0


@pytest.fixture
def engine() -> Iterator[Engine]:
    config = EngineConfig(
        model=MODEL_DIRECTORY,
        record_steps=True,
        prefix_cache=False,
        prefetch=False,
        max_batch_tokens=16,
    )
    with Engine(config) as engine:
        for name in ("upper", "sort"):  # ranks 4 and 64
            engine.load_adapter(name, adapter_directory(name))
        yield engine


def records_of(engine: Engine, tokens: int) -> list[StepRecord]:
    """All records, once they show so many tokens."""
    found: list[StepRecord] = []
    deadline = time.monotonic() + TIMEOUT_S
    while sum(r.prefill_tokens + r.decode_tokens for r in found) < tokens:
        assert time.monotonic() < deadline
        found += engine.take_step_records()
    return found


def test_a_record_holds_the_features_of_its_step(engine: Engine) -> None:
    engine.generate([PROMPT], PARAMS, ["sort"])  # its install was over before its first step
    first, second, *rest = records_of(engine, 24)
    assert (first.prefill_tokens, first.decode_tokens, first.installs) == (16, 0, 0)
    assert first.chunk_context == 16 * 8
    assert (second.prefill_tokens, second.decode_tokens, second.installs) == (4, 0, 0)
    assert second.chunk_context == 4 * 18
    assert [(r.prefill_tokens, r.decode_tokens, r.context_tokens) for r in rest] == [
        (0, 1, length) for length in (21, 22, 23, 24)
    ]
    for record in (first, second, *rest):
        assert record.token_ranks == 64 * (record.prefill_tokens + record.decode_tokens)
        assert (record.adapters, record.max_rank) == (1, 64)
        # All of its weights, and less than a tenth of padding.
        assert 1770816 - 4096 <= record.adapter_bytes <= 1.1 * 1770816
        assert record.seconds > 0
    assert sum(r.seconds for r in (first, second, *rest)) == pytest.approx(
        engine.stats().step_seconds
    )
    assert engine.take_step_records() == []


def test_base_only_tokens_add_no_rank(engine: Engine) -> None:
    engine.generate([PROMPT[:4]], PARAMS)
    for record in records_of(engine, 8):
        assert (record.token_ranks, record.adapters, record.adapter_bytes) == (0, 0, 0)


def test_installed_adapters_are_those_in_pages(engine: Engine) -> None:
    assert engine.installed() == frozenset()
    engine.generate([PROMPT[:4]], PARAMS, ["sort"])
    deadline = time.monotonic() + TIMEOUT_S
    while engine.installed() != {"sort"}:
        assert time.monotonic() < deadline
    engine.unload_adapter("sort", TIMEOUT_S)
    assert engine.installed() == frozenset()


def test_an_evicted_adapter_is_not_installed() -> None:
    # Room for one of the two adapters and a few blocks only.
    config = EngineConfig(model=MODEL_DIRECTORY, memory_bytes=5 << 20)
    with Engine(config) as engine:
        for name in ("reverse", "sort"):
            engine.load_adapter(name, adapter_directory(name))
        for name in ("reverse", "sort", "reverse"):
            engine.generate([PROMPT[:4]], PARAMS, [name])
        assert engine.stats().adapter_evictions >= 1
        deadline = time.monotonic() + TIMEOUT_S
        while engine.installed() != {"reverse"}:
            assert time.monotonic() < deadline


def test_nothing_is_recorded_unless_asked_for() -> None:
    with Engine(EngineConfig(model=MODEL_DIRECTORY)) as engine:
        engine.generate([PROMPT[:4]], PARAMS)
        time.sleep(0.05)
        assert engine.take_step_records() == []
