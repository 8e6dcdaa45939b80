"""The openai SDK, unmodified, against `loraserve serve --demo`."""

import asyncio
import re
import time
import urllib.request
from collections.abc import Iterator

import openai
import pytest
from served_http import ServedHttp

from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME
from loraserve.demo.skills import SKILLS, skill
from loraserve.text.tokenizer import Tokenizer

WORD = "garden"
TOKENIZER = Tokenizer.from_directory(MODEL_DIRECTORY)


@pytest.fixture
def client(front: ServedHttp) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


def test_models_are_listed_with_their_parents(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {MODEL_NAME, *(skill.name for skill in SKILLS)}
    parents = {name: model.model_dump()["parent"] for name, model in models.items()}
    assert parents == {name: None if name == MODEL_NAME else MODEL_NAME for name in models}
    assert client.models.retrieve("reverse").id == "reverse"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("name", [skill.name for skill in SKILLS])
def test_every_adapter_answers_as_itself(client: openai.OpenAI, name: str) -> None:
    done = client.completions.create(model=name, prompt=f"{WORD}=", temperature=0, max_tokens=32)
    assert done.choices[0].text == skill(name).answer(WORD)
    assert done.choices[0].finish_reason == "stop"
    chat = client.chat.completions.create(
        model=f"{MODEL_NAME}:{name}",
        messages=[{"role": "user", "content": WORD}],
        temperature=0,
    )
    assert chat.choices[0].message.content == skill(name).answer(WORD)
    assert chat.usage == done.usage


def test_streams_are_the_whole_answer(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="reverse",
            prompt=f"{WORD}=",
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == WORD[::-1]
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(WORD) + 1
    stream = client.chat.completions.create(
        model="reverse", messages=[{"role": "user", "content": WORD}], temperature=0, stream=True
    )
    parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts) == WORD[::-1]
    assert all(part.usage is None for part in parts)


def test_the_last_chunk_of_a_chat_tells_the_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="reverse",
        messages=[{"role": "user", "content": WORD}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *parts, last = stream
    assert "".join(p.choices[0].delta.content or "" for p in parts) == WORD[::-1]
    assert [p.choices[0].finish_reason for p in parts][-1] == "stop"
    assert all(part.usage is None for part in parts)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(WORD) + 1
    assert last.usage.total_tokens == last.usage.prompt_tokens + len(WORD) + 1


def test_the_async_client_streams_many_at_once(front: ServedHttp) -> None:
    async def one(client: openai.AsyncOpenAI, name: str) -> str:
        stream = await client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": WORD}],
            temperature=0,
            stream=True,
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def test() -> None:
        async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="EMPTY") as client:
            names = [skill.name for skill in SKILLS] * 3
            texts = await asyncio.gather(*(one(client, name) for name in names))
            assert texts == [skill(name).answer(WORD) for name in names]

    asyncio.run(test())


def test_errors_are_those_of_the_sdk(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="reverse", prompt="x" * 300)
    assert long.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as many:
        client.completions.create(model="reverse", prompt="x", n=1000)
    assert many.value.param == "n"
    with pytest.raises(openai.BadRequestError) as streamed:
        client.completions.create(model="reverse", prompt="x" * 300, stream=True)
    assert streamed.value.param == "prompt"


def test_several_prompts_and_answers(client: openai.OpenAI) -> None:
    done = client.completions.create(model="upper", prompt=["abc=", "abc="], n=2, temperature=0)
    assert [choice.text for choice in done.choices] == ["ABC"] * 4
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    ids = client.completions.create(
        model="upper", prompt=[TOKENIZER.encode("abc="), TOKENIZER.encode("xyz=")], temperature=0
    )
    assert [choice.text for choice in ids.choices] == ["ABC", "XYZ"]
    chunks = client.completions.create(
        model="upper", prompt=["abc=", "xyz="], temperature=0, stream=True
    )
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["ABC", "XYZ"]


def test_logprobs(client: openai.OpenAI) -> None:
    done = client.completions.create(model="upper", prompt="abc=", temperature=0, logprobs=2)
    told = done.choices[0].logprobs
    assert told is not None
    assert told.tokens == ["A", "B", "C", "<eos>"]
    assert told.text_offset == [0, 1, 2, 3]
    assert told.token_logprobs is not None
    assert all(-0.5 < value <= 0 for value in told.token_logprobs)
    assert all(len(top) == 2 for top in told.top_logprobs or [])
    chat = client.chat.completions.create(
        model="upper",
        messages=[{"role": "user", "content": "abc"}],
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content
    assert [entry.logprob for entry in content] == told.token_logprobs
    assert [len(entry.top_logprobs) for entry in content] == [2] * 4


def test_adapters_are_loaded_and_unloaded(client: openai.OpenAI) -> None:
    def ask() -> str:
        return (
            client.completions.create(model="sdk-shout", prompt=f"{WORD}=", temperature=0)
            .choices[0]
            .text
        )

    with pytest.raises(openai.NotFoundError):
        ask()
    load = {"lora_name": "sdk-shout", "lora_path": "upper"}
    said = client.post("/load_lora_adapter", cast_to=str, body=load)
    assert said == "Success: LoRA adapter 'sdk-shout' added successfully."
    try:
        assert ask() == WORD.upper()
        assert client.models.retrieve("sdk-shout").model_dump()["parent"] == MODEL_NAME
        with pytest.raises(openai.ConflictError):
            client.post("/load_lora_adapter", cast_to=str, body=load)
        with pytest.raises(openai.PermissionDeniedError) as outside:
            client.post("/load_lora_adapter", cast_to=str, body=load | {"lora_path": "/etc"})
        assert outside.value.param == "lora_path"
    finally:
        said = client.post("/unload_lora_adapter", cast_to=str, body={"lora_name": "sdk-shout"})
    assert said == "Success: LoRA adapter 'sdk-shout' removed successfully."
    with pytest.raises(openai.NotFoundError):
        ask()
    with pytest.raises(openai.NotFoundError):
        client.post("/unload_lora_adapter", cast_to=str, body={"lora_name": "sdk-shout"})


def test_the_async_client_raises_the_same_errors(front: ServedHttp) -> None:
    async def test() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{front.url}/v1", api_key="EMPTY", max_retries=0
        ) as client:
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="nobody", prompt="x")
            with pytest.raises(openai.BadRequestError) as wrong:
                await client.chat.completions.create(
                    model="reverse",
                    messages=[{"role": "user", "content": "x"}],
                    temperature=1000,
                    stream=True,
                )
            assert wrong.value.param == "temperature"
            done = await client.completions.create(
                model="upper", prompt=["abc=", "xyz="], temperature=0
            )
            assert [choice.text for choice in done.choices] == ["ABC", "XYZ"]

    asyncio.run(test())


def test_streams_that_are_closed_early_end(front: ServedHttp, client: openai.OpenAI) -> None:
    """Nothing runs on for a client that is gone, and those that stay are answered."""
    for _ in range(8):
        stream = client.completions.create(
            model="upper",
            prompt=f"{WORD}=",
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        assert next(iter(stream)).choices[0].text is not None
        stream.close()
    end = time.monotonic() + 60
    while running_answers(front):
        assert time.monotonic() < end, "answers run on"
        time.sleep(0.02)
    done = client.completions.create(model="upper", prompt=f"{WORD}=", temperature=0)
    assert done.choices[0].text == WORD.upper()


def running_answers(front: ServedHttp) -> float:
    with urllib.request.urlopen(f"{front.url}/metrics", timeout=60) as got:
        found = re.search(
            r"^vllm:num_requests_running(?:\{.*\})? (\S+)$", got.read().decode(), re.M
        )
    assert found is not None
    return float(found[1])
