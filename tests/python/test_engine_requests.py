"""The engine as its users hold it: the demo model, text, streams, deadlines, stopping, resuming."""

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest

from loraserve import Engine, EngineConfig, SamplingParams, demo
from loraserve.demo import skills
from loraserve.errors import DeadlineExceededError, InvalidArgumentError

TIMEOUT_S = 120.0
WORD = skills.held_out_words(1)[0]
PROMPT = skills.prompt(WORD)
LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(EngineConfig(model=demo.MODEL_DIRECTORY, base_name=demo.MODEL_NAME)) as engine:
        for name in ("upper", "reverse"):
            engine.load_adapter(name, demo.adapter_directory(name))
        yield engine


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 16, "temperature": 0.0, **options})


def test_the_first_example() -> None:
    """Line by line what the documentation shows, with every option of the configuration."""
    config = EngineConfig(
        model=demo.MODEL_DIRECTORY,
        device="cpu",
        weight_dtype="auto",
        adapter_dtype="auto",
        memory_bytes=64 << 20,
        block_size=32,
        max_batch_tokens=128,
        max_sequences=8,
        threads=1,
    )
    engine = Engine(config)
    engine.load_adapter("sql", demo.adapter_directory("upper"))
    params = SamplingParams(max_tokens=16, temperature=0.0, logprobs=0)
    prompts = [engine.encode("abc="), engine.encode("d=")]
    assert all(isinstance(token, int) for prompt in prompts for token in prompt)
    done = engine.generate(prompts, params, adapters=["sql", None])
    assert len(done) == 2
    assert done[0].text == "ABC"
    assert done[0].token_ids[:3] == engine.encode("ABC")[-3:]
    assert done[0].finish_reason == "stop"
    assert len(done[0].logprobs) == len(done[0].token_ids)
    assert all(-5 < value <= 0 for value in done[0].logprobs)
    assert done[0].top_logprobs is None or all(not top for top in done[0].top_logprobs)

    async def stream() -> list[Any]:
        return [chunk async for chunk in engine.stream("abc=", params, adapter="sql")]

    chunks = asyncio.run(stream())
    assert "".join(chunk.text for chunk in chunks) == "ABC"
    # They join without gap or overlap; a loop that is slow gets several steps as one chunk.
    ends = itertools.accumulate((len(chunk.token_ids) for chunk in chunks), initial=0)
    assert [chunk.first_index for chunk in chunks] == list(ends)[:-1]
    assert chunks[-1].finish_reason == "stop"
    engine.close()


@pytest.mark.parametrize("weight_dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("adapter_dtype", ["auto", "float32", "bfloat16"])
def test_dtype_choices(weight_dtype: Any, adapter_dtype: Any) -> None:
    config = EngineConfig(
        model=demo.MODEL_DIRECTORY, weight_dtype=weight_dtype, adapter_dtype=adapter_dtype
    )
    with Engine(config) as engine:
        assert engine.weight_dtype == (weight_dtype if weight_dtype != "auto" else "bfloat16")
        engine.load_adapter("reverse", demo.adapter_directory("reverse"))
        (done,) = engine.generate([PROMPT], greedy(), ["reverse"])
        assert done.text == WORD[::-1]
        stored = 4 if adapter_dtype == "float32" else 2
        ranks = sum(
            m.rank * (m.in_features + m.out_features)
            for m in engine_modules(demo.adapter_directory("reverse"))
        )
        assert engine.stats().adapter_weight_bytes == stored * ranks


def test_activations_rounded_to_bfloat16() -> None:
    """Not the same numbers, and close to them."""
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=0)
    found = []
    for dtype in ("float32", "bfloat16", "auto"):
        config = EngineConfig(model=demo.MODEL_DIRECTORY, activation_dtype=dtype)  # type: ignore[arg-type]
        with Engine(config) as engine:
            assert engine.backend_name.endswith("bfloat16") == (dtype == "bfloat16")
            engine.load_adapter("reverse", demo.adapter_directory("reverse"))
            (done,) = engine.generate([PROMPT], params, ["reverse"])
            assert done.text == WORD[::-1]
            found.append(done.logprobs)
    exact, rounded, auto = found
    assert auto == exact != rounded
    assert rounded == pytest.approx(exact, abs=0.05)


def engine_modules(directory: Any) -> Any:
    from loraserve.checkpoint.peft_adapter import read_peft_directory

    source = read_peft_directory(directory)
    assert {module.dtype for module in source.modules} == {"BF16"}
    return source.modules


def test_every_skill_in_one_batch() -> None:
    words = skills.held_out_words(4)
    wanted = [(skill, word) for skill in skills.SKILLS for word in words]
    with Engine(EngineConfig(model=demo.MODEL_DIRECTORY)) as engine:
        for skill in skills.SKILLS:
            engine.load_adapter(skill.name, demo.adapter_directory(skill.name))
        prompts = [skills.prompt(word) for _, word in wanted]
        done = engine.generate(prompts, greedy(max_tokens=20), [skill.name for skill, _ in wanted])
    right = sum(
        answer.text == skill.answer(word)
        for answer, (skill, word) in zip(done, wanted, strict=True)
    )
    assert right >= 0.95 * len(wanted)


@pytest.mark.parametrize(
    "stop", [WORD[1].upper(), WORD[1:3].upper(), (WORD[2] + WORD[3:4]).upper()]
)
def test_nothing_past_a_stop_string_gets_out(engine: Engine, stop: str) -> None:
    whole = WORD.upper()
    assert stop in whole
    params = greedy(stop=[stop, "never"], logprobs=0)

    async def stream() -> list[Any]:
        return [chunk async for chunk in engine.stream(PROMPT, params, "upper")]

    chunks = asyncio.run(stream())
    (done,) = engine.generate([PROMPT], params, ["upper"])
    assert done.text == "".join(c.text or "" for c in chunks) == whole[: whole.index(stop)]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    # A byte a token here: those of the stop string itself are told, nothing behind them is.
    assert len(done.token_ids) == whole.index(stop) + len(stop)
    assert len(done.logprobs) == len(done.token_ids) == sum(len(c.token_ids) for c in chunks)
    assert chunks[-1].finish_reason == "stop"
    assert all(stop not in (c.text or "") for c in chunks)
    assert engine.stats().running == 0 or wait_until_idle(engine)


def wait_until_idle(engine: Engine) -> bool:
    end = time.monotonic() + TIMEOUT_S
    while engine.stats().running + engine.stats().waiting:
        assert time.monotonic() < end, "the engine goes on past the stop string"
        time.sleep(0.001)
    return True


def test_stop_token_ids_and_min_tokens(engine: Engine) -> None:
    token = engine.encode(WORD[0].upper())[-1]
    (done,) = engine.generate([PROMPT], greedy(stop_token_ids=[token]), ["upper"])
    assert (done.finish_reason, done.stop_reason) == ("stop", token)
    assert (done.token_ids, done.text) == ([token], "")
    # The end token is wanted most, and forbidden for ten tokens.
    end = engine.tokenizer.eos_ids[0] if engine.tokenizer else 0
    params = greedy(logit_bias={end: 1000.0}, min_tokens=10)
    (done,) = engine.generate([PROMPT], params, ["upper"])
    assert len(done.token_ids) == 11
    assert (done.finish_reason, done.stop_reason) == ("stop", end)


def test_a_deadline_passes_while_running_and_while_waiting() -> None:
    with Engine(EngineConfig(model=demo.MODEL_DIRECTORY, max_sequences=1)) as engine:
        started = time.monotonic()
        running = engine.submit([1] * 8, LONG, timeout_s=0.005)
        waiting = engine.submit([2] * 8, LONG, timeout_s=0.002)
        for handle in (running, waiting):
            with pytest.raises(DeadlineExceededError) as caught:
                handle.result(TIMEOUT_S)
            assert caught.value.field == "deadline"
        # Long before either could have ended, and everything was given back.
        assert time.monotonic() - started < TIMEOUT_S
        wait_until_idle(engine)
        assert len(engine.submit([3], greedy(ignore_eos=True)).result(TIMEOUT_S).token_ids) == 16
        assert engine.stats().generated_tokens < 400


def test_the_time_in_the_queue_is_told() -> None:
    """Only one runs at a time: the second waits for the first; its first chunk says how long."""
    with Engine(EngineConfig(model=demo.MODEL_DIRECTORY, max_sequences=1)) as engine:

        async def ask() -> tuple[list[Any], float, list[Any]]:
            loop = asyncio.get_running_loop()
            submitting = time.monotonic()
            first = engine.submit([1, 2], LONG, loop=loop)
            second = engine.submit([3, 4], greedy(max_tokens=3, ignore_eos=True), loop=loop)
            before = [chunk async for chunk in first.chunks()]
            chunks = [chunk async for chunk in second.chunks()]
            return before, time.monotonic() - submitting, chunks

        before, ended, chunks = asyncio.run(ask())
        stepping = engine.stats().step_seconds
        assert before[0].queue_s < chunks[0].queue_s <= ended
        # The steps of the first, but for what went before the second was there.
        assert chunks[0].queue_s > 0.25 * stepping
        assert all(chunk.queue_s == 0.0 for chunk in (*chunks[1:], *before[1:]))
        alone = [engine.submit([5], greedy()).result(TIMEOUT_S).queue_s for _ in range(5)]
        assert 0.0 <= min(alone) < chunks[0].queue_s


def test_tenants_do_not_share_prefixes(engine: Engine) -> None:
    """Or one could measure what another has asked."""
    prompt = [token % 250 for token in range(3, 60)]

    def cached(tenant: str) -> int:
        handle = engine.submit(prompt, greedy(max_tokens=1), tenant=tenant)
        return handle.result(TIMEOUT_S).cached_tokens

    assert [cached("a"), cached("a"), cached("b"), cached("b")] == [0, 48, 0, 48]


def test_leaving_a_stream_ends_its_request(engine: Engine) -> None:
    async def leave() -> int:
        count = 0
        stream = engine.stream([9, 9], LONG)
        async for _ in stream:
            count += 1
            if count == 3:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        return count

    end = time.monotonic() + TIMEOUT_S
    while True:
        before = engine.stats().generated_tokens
        left_early = asyncio.run(leave()) == 3
        wait_until_idle(engine)
        if left_early and engine.stats().generated_tokens - before < 200:
            break
        # Where the loop stood still meanwhile, the engine may have come to the last token.
        assert time.monotonic() < end, "a stream that is left goes on"


def test_one_wake_up_carries_a_steps_tokens(engine: Engine) -> None:
    """Eight streams of one loop cost it one call for each step, not one for each token."""

    async def run() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        calls = 0
        original = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]

        async def one(index: int) -> int:
            params = greedy(max_tokens=40, ignore_eos=True)
            return sum([len(c.token_ids) async for c in engine.stream([index + 1, 7], params)])

        tokens = sum(await asyncio.gather(*(one(i) for i in range(8))))
        return calls, tokens

    before = engine.stats().steps
    calls, tokens = asyncio.run(run())
    assert tokens == 8 * 40
    assert 1 <= calls <= engine.stats().steps - before < tokens / 2


@pytest.mark.parametrize("done", [1, 5, 15])
def test_a_resumed_request_goes_on_as_if_never_interrupted(engine: Engine, done: int) -> None:
    """Draws, penalties and log-probabilities depend on position, not on the attempt."""
    options: dict[str, Any] = {
        "temperature": 1.3,
        "seed": 11,
        "ignore_eos": True,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logprobs": 2,
    }
    prompt = engine.encode(PROMPT)
    (whole,) = engine.generate([prompt], SamplingParams(max_tokens=24, **options), ["upper"])
    rest = engine.submit(
        [*prompt, *whole.token_ids[:done]],
        SamplingParams(max_tokens=24 - done, **options),
        "upper",
        start_index=done,
    ).result(TIMEOUT_S)
    assert rest.token_ids == whole.token_ids[done:]
    assert rest.logprobs == whole.logprobs[done:]
    assert whole.top_logprobs is not None
    assert rest.top_logprobs == whole.top_logprobs[done:]


@pytest.mark.parametrize("min_tokens", [1, 10, 14])
def test_a_resumed_request_keeps_its_minimum(engine: Engine, min_tokens: int) -> None:
    """The end is wanted most and forbidden for so many tokens of the whole answer, which the
    minimum may exceed what is left of: cut at every point, the parts are the answer."""
    assert engine.tokenizer
    options: dict[str, Any] = {
        "logit_bias": {engine.tokenizer.eos_ids[0]: 1000.0},
        "min_tokens": min_tokens,
    }
    prompt = engine.encode(PROMPT)
    (whole,) = engine.generate([prompt], [greedy(max_tokens=14, **options)], ["upper"])
    assert len(whole.token_ids) == min(min_tokens + 1, 14)
    for done in range(1, len(whole.token_ids)):
        params = greedy(max_tokens=14 - done, **options)
        resumed = [*prompt, *whole.token_ids[:done]]
        rest = engine.submit(resumed, params, "upper", start_index=done).result(TIMEOUT_S)
        assert rest.token_ids == whole.token_ids[done:]
        assert rest.finish_reason == whole.finish_reason


def test_a_minimum_beyond_the_whole_answer_is_refused(engine: Engine) -> None:
    params = SamplingParams(max_tokens=4, min_tokens=8)
    with pytest.raises(InvalidArgumentError) as caught:
        engine.submit([1, 2, 3, 4], params, start_index=3)
    assert caught.value.field == "min_tokens"
