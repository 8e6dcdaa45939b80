"""What is wrong with a request or an adapter is refused by a typed error that names the field."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle.adapters import AdapterSpec, make_adapters
from oracle.checkpoints import CONTEXT, SPECS
from oracle.comparison import compare
from oracle.store import OracleStore
from safetensors.torch import load_file, save_file

from loraserve import Engine, EngineConfig, SamplingParams
from loraserve.errors import (
    AlreadyExistsError,
    CancelledError,
    FailedPreconditionError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    ResourceExhaustedError,
)

NAME = "llama"
VOCAB = SPECS[NAME].vocab
TIMEOUT_S = 120.0
SHORT = {"max_tokens": 2, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}


@pytest.fixture(scope="module")
def engine(store: OracleStore) -> Iterator[Engine]:
    with Engine(EngineConfig(model=store.checkpoint(NAME), weight_dtype="float32")) as engine:
        engine.load_adapter("good", store.adapters(NAME)["r8"])
        yield engine


def ask(engine: Engine, prompt: list[int], adapter: str | None = None, **params: Any) -> Any:
    """Whether submit or the result raises is the engine's choice."""
    given = SamplingParams(**{**SHORT, **params})
    return engine.submit(prompt, given, adapter=adapter).result(timeout_s=TIMEOUT_S)


def outcome(wait: Callable[[], Any]) -> Any:
    """What `wait` returns, or the typed error that it raises."""
    try:
        return wait()
    except LoraServeError as error:
        return error


def assert_still_right(engine: Engine, store: OracleStore) -> None:
    """What was refused left nothing behind: base and adapter still answer as the oracle does."""
    reference, prompt = store.reference(NAME), [3, 1, 4, 1, 5]
    for adapter, known_as in ((None, None), ("good", "r8")):
        answer = ask(engine, prompt, adapter)
        one = compare(answer, reference, prompt, known_as, tolerance=1e-4, greedy=True)
        assert one.agrees(1e-4), one
    assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ([], {}, "prompt"),
        ([VOCAB], {}, "prompt"),
        ([5, -1], {}, "prompt"),
        ([2**31], {}, "prompt"),
        ([2**63], {}, "prompt"),
        ([7] * CONTEXT, {}, "prompt"),
        ([7] * (CONTEXT + 1), {}, "prompt"),
        ([7] * 100_000, {}, "prompt"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"max_tokens": -1}, "max_tokens"),
        ([1], {"max_tokens": 1, "min_tokens": 2}, "min_tokens"),
        ([1], {"temperature": -0.1}, "temperature"),
        ([1], {"temperature": math.nan}, "temperature"),
        ([1], {"temperature": math.inf}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_p": 1.0001}, "top_p"),
        ([1], {"top_p": math.nan}, "top_p"),
        ([1], {"min_p": -0.1}, "min_p"),
        ([1], {"min_p": 1.1}, "min_p"),
        ([1], {"top_k": -2}, "top_k"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([1], {"presence_penalty": math.nan}, "presence_penalty"),
        ([1], {"frequency_penalty": math.inf}, "frequency_penalty"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"logit_bias": {3: math.nan}}, "logit_bias"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ([1], {"logprobs": -1}, "logprobs"),
        ([1], {"logprobs": VOCAB + 1}, "logprobs"),
    ],
    ids=lambda value: f"{len(value)} tokens" if isinstance(value, list) else None,
)
def test_a_bad_request_is_refused(
    engine: Engine, prompt: list[int], params: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ask(engine, prompt, **params)
    assert field in caught.value.field
    assert caught.value.message


def test_nothing_is_left_behind_by_bad_requests(engine: Engine, store: OracleStore) -> None:
    test_a_bad_request_is_refused(engine, [], {}, "prompt")
    assert_still_right(engine, store)


def test_the_context_can_be_filled_but_not_passed(engine: Engine, store: OracleStore) -> None:
    """`max_tokens` reaches at most to the end of the context; the last token is still right."""
    prompt = list(range(100)) * 6
    for room in (1, 3):
        answer = ask(engine, prompt[: CONTEXT - room], max_tokens=50)
        assert len(answer.token_ids) == room
        assert answer.finish_reason == "length"
        one = compare(answer, store.reference(NAME), prompt[: CONTEXT - room], tolerance=1e-4)
        assert one.agrees(1e-4), one


def test_generate_raises_the_error_of_the_bad_request(engine: Engine, store: OracleStore) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        engine.generate([[1, 2], [], [3]], SamplingParams(**SHORT))
    assert "prompt" in caught.value.field
    assert_still_right(engine, store)


def test_more_than_memory_can_ever_hold(store: OracleStore) -> None:
    """Found by shrinking the memory: what does not fit is refused, at once and by name."""
    prompt = [7] * (CONTEXT - 10)
    memory = 64 << 20
    for _ in range(30):
        memory //= 2
        try:
            config = EngineConfig(
                model=store.checkpoint(NAME), weight_dtype="float32", memory_bytes=memory
            )
            engine = Engine(config)
        except LoraServeError as error:
            pytest.fail(f"the engine wants more than {memory} bytes to start: {error}")
        with engine:
            answer = outcome(lambda: ask(engine, prompt))  # noqa: B023 (called at once)
            if isinstance(answer, LoraServeError):
                assert isinstance(answer, ResourceExhaustedError)
                assert "prompt" in answer.field
                assert len(ask(engine, [7]).token_ids) == 2  # a short one still fits
                return
            assert len(answer.token_ids) == 2
    pytest.fail("no memory was too small")


def test_a_duplicate_request_id(engine: Engine, store: OracleStore) -> None:
    """Taken while the first runs, free again afterwards."""
    slow = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    first = engine.submit([1, 2], slow, request_id="same")
    with pytest.raises(AlreadyExistsError) as caught:
        engine.submit([3], SamplingParams(**SHORT), request_id="same").result(timeout_s=TIMEOUT_S)
    assert caught.value.field == "request_id"
    assert len(first.result(timeout_s=TIMEOUT_S).token_ids) == 400
    again = engine.submit([3], SamplingParams(**SHORT), request_id="same")
    assert len(again.result(timeout_s=TIMEOUT_S).token_ids) == 2


def test_an_aborted_request(engine: Engine, store: OracleStore) -> None:
    """It ends as cancelled, long before its last token, and gives everything back."""
    slow = SamplingParams(max_tokens=450, temperature=0.0, ignore_eos=True)
    handles = [engine.submit([i, 2], slow, adapter="good") for i in range(1, 9)]
    for handle in handles:
        handle.abort()
    cancelled = 0
    for handle in handles:
        answer = outcome(lambda: handle.result(timeout_s=TIMEOUT_S))  # noqa: B023 (at once)
        if isinstance(answer, LoraServeError):  # either way of telling is right
            assert isinstance(answer, CancelledError)
            assert answer.field
            cancelled += 1
        else:
            cancelled += answer.finish_reason == "cancelled"
            assert answer.finish_reason == "length" or len(answer.token_ids) < 450
    assert cancelled >= 1
    handles[0].abort()  # a second time, after the end: nothing happens
    deadline = time.monotonic() + TIMEOUT_S
    while engine.stats().running + engine.stats().waiting and time.monotonic() < deadline:
        time.sleep(0.001)
    assert_still_right(engine, store)


def test_an_unknown_adapter(engine: Engine, store: OracleStore) -> None:
    for wrong in ("nobody", "", "good "):
        with pytest.raises(LoraServeError) as caught:
            ask(engine, [1], wrong)
        assert isinstance(caught.value, NotFoundError | InvalidArgumentError)
        assert "adapter" in caught.value.field
    with pytest.raises(NotFoundError) as unload:
        engine.unload_adapter("nobody")
    assert unload.value.field
    assert_still_right(engine, store)


def test_an_adapter_name_is_taken(engine: Engine, store: OracleStore) -> None:
    with pytest.raises(AlreadyExistsError) as caught:
        engine.load_adapter("good", store.adapters(NAME)["r16"])
    assert caught.value.field
    assert_still_right(engine, store)


def rename(old: str, new: str) -> Callable[[Path], None]:
    """Renames modules in the tensors and, where it lists them, in the configuration."""

    def mutate(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        assert any(old in name for name in tensors)
        save_file({name.replace(old, new): t for name, t in tensors.items()}, path)
        config_path = directory / "adapter_config.json"
        config_path.write_text(config_path.read_text().replace(f'"{old}"', f'"{new}"'))

    return mutate


def set_rank(rank: int) -> Callable[[Path], None]:
    def mutate(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "r": rank}))

    return mutate


def spoil(value: float) -> Callable[[Path], None]:
    def mutate(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        name = sorted(tensors)[-1]
        tensors[name][0, 0] = value
        save_file(tensors, path)

    return mutate


@pytest.mark.parametrize(
    ("mutate", "expected"),
    [
        (rename("q_proj", "c_attn"), (FailedPreconditionError, InvalidArgumentError)),
        (rename("layers.1.", "layers.2."), (FailedPreconditionError, InvalidArgumentError)),
        (set_rank(7), (InvalidArgumentError,)),
        (set_rank(0), (FailedPreconditionError, InvalidArgumentError)),
        (set_rank(-8), (FailedPreconditionError, InvalidArgumentError)),
        (spoil(math.nan), (InvalidArgumentError,)),
        (spoil(math.inf), (InvalidArgumentError,)),
    ],
    ids=["module", "layer", "rank and shape", "rank 0", "negative rank", "NaN", "infinity"],
)
def test_a_broken_adapter_is_refused(
    engine: Engine,
    store: OracleStore,
    tmp_path: Path,
    mutate: Callable[[Path], None],
    expected: tuple[type[LoraServeError], ...],
) -> None:
    mutant = tmp_path / "mutant"
    shutil.copytree(store.adapters(NAME)["r17"], mutant)
    mutate(mutant)
    with pytest.raises(expected) as caught:
        engine.load_adapter("bad", mutant, allow_base_mismatch=True)
    assert caught.value.field
    with pytest.raises(NotFoundError):
        ask(engine, [1], "bad")
    assert_still_right(engine, store)


@pytest.mark.parametrize("allow", [False, True])
def test_an_adapter_of_another_base(engine: Engine, store: OracleStore, allow: bool) -> None:
    """Another shape is refused even where another base's name is allowed."""
    with pytest.raises((FailedPreconditionError, InvalidArgumentError)) as caught:
        engine.load_adapter("other", store.adapters("qwen3")["r8"], allow_base_mismatch=allow)
    assert caught.value.field
    assert_still_right(engine, store)


def test_a_rank_over_the_limit(engine: Engine, store: OracleStore, tmp_path: Path) -> None:
    """512 is accepted, and right; 513 is not."""
    specs = [AdapterSpec(f"r{rank}", rank, 2 * rank, ("v_proj",)) for rank in (512, 513)]
    made = make_adapters(store.checkpoint(NAME), tmp_path, specs)
    with pytest.raises((FailedPreconditionError, InvalidArgumentError)) as caught:
        engine.load_adapter("r513", made["r513"])
    assert caught.value.field
    assert "512" in str(caught.value)
    reference = store.reference(NAME)
    reference.add_adapter("r512", made["r512"], check=False)
    engine.load_adapter("r512", made["r512"])
    answer, prompt = ask(engine, [9, 8, 7], "r512", prompt_logprobs=True), [9, 8, 7]
    one = compare(answer, reference, prompt, "r512", tolerance=1e-4, greedy=True)
    assert one.agrees(1e-4), one
    engine.unload_adapter("r512")
    assert_still_right(engine, store)


def test_an_adapter_too_large_for_memory(store: OracleStore) -> None:
    """Refused by load_adapter or by the first request for it, never a hang."""
    config = EngineConfig(
        model=store.checkpoint(NAME), weight_dtype="float32", memory_bytes=300_000
    )
    with Engine(config) as engine:

        def load_and_ask() -> Any:
            engine.load_adapter("large", store.adapters(NAME)["r128"])
            return ask(engine, [1], "large")

        error = outcome(load_and_ask)
    assert isinstance(error, ResourceExhaustedError)
    assert error.field


def test_a_closed_engine(store: OracleStore) -> None:
    """Closing ends what runs, twice is once, and afterwards every call is refused."""
    engine = Engine(EngineConfig(model=store.checkpoint(NAME), weight_dtype="float32"))
    slow = SamplingParams(max_tokens=450, temperature=0.0, ignore_eos=True)
    handle = engine.submit([1, 2], slow)
    engine.close()
    engine.close()
    ended = outcome(lambda: handle.result(timeout_s=TIMEOUT_S))
    if not isinstance(ended, LoraServeError):  # either way of telling is right
        assert ended.finish_reason in ("cancelled", "length")
    with pytest.raises(LoraServeError) as caught:
        engine.submit([1], SamplingParams(**SHORT)).result(timeout_s=TIMEOUT_S)
    assert caught.value.field
