"""64 mixed requests at once: the text by HTTP, by the SDK, and of an engine alone is the same, byte
for byte."""

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from served_http import ServedHttp

from loraserve import AsyncClient, Engine, EngineConfig, SamplingParams
from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME, adapter_directory
from loraserve.demo.skills import SKILLS, random_word
from loraserve.text.tokenizer import Tokenizer

COUNT = 64
TOKENIZER = Tokenizer.from_directory(MODEL_DIRECTORY)


@dataclass(frozen=True)
class Wanted:
    prompt: str
    adapter: str | None
    params: SamplingParams
    way: str
    """By HTTP: "text", "ids" or "chat", and "stream" or "whole"."""


def wanted(seed: int, sampled: bool) -> list[Wanted]:
    rng = random.Random(seed)
    names = [skill.name for skill in SKILLS] + [None]
    found = []
    for _ in range(COUNT):
        params: dict[str, Any] = {"max_tokens": rng.randint(1, 40), "temperature": 0.0}
        if sampled:
            params |= {
                "temperature": rng.choice([0.7, 1.0, 1.5]),
                "seed": rng.randrange(1 << 62),
                "top_p": rng.choice([1.0, 0.9]),
                "top_k": rng.choice([0, 20]),
                "min_p": rng.choice([0.0, 0.02]),
            }
        if rng.random() < 0.3:
            params["stop"] = tuple(rng.sample(["e", "st", "aa", "y=", "XY"], 2))
        if rng.random() < 0.3:
            params |= {"ignore_eos": True, "frequency_penalty": 0.5}
        if rng.random() < 0.2:
            params["logit_bias"] = {rng.randrange(97, 123): 3.0}
        way = f"{rng.choice(['text', 'ids', 'chat'])} {rng.choice(['stream', 'whole'])}"
        prompt = " ".join(random_word(rng) for _ in range(rng.randint(1, 4)))
        found.append(Wanted(prompt, rng.choice(names), SamplingParams(**params), way))
    return found


def body_of(one: Wanted) -> dict[str, Any]:
    params = one.params
    extra = {"top_k": params.top_k, "min_p": params.min_p, "ignore_eos": params.ignore_eos}
    body: dict[str, Any] = {
        "model": one.adapter or MODEL_NAME,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "frequency_penalty": params.frequency_penalty,
        "stop": list(params.stop) or None,
        "logit_bias": {str(k): v for k, v in params.logit_bias.items()} or None,
        "extra_body": extra,
    }
    if params.seed is not None:
        body["seed"] = params.seed
    return body


async def by_http(client: openai.AsyncOpenAI, one: Wanted) -> str:
    kind, mode = one.way.split()
    body, stream = body_of(one), mode == "stream"
    if kind == "chat":
        # The demo's template puts "=" behind the last message.
        messages: Any = [{"role": "user", "content": one.prompt}]
        answer: Any = await client.chat.completions.create(messages=messages, stream=stream, **body)
        if not stream:
            return answer.choices[0].message.content or ""
        return "".join([c.choices[0].delta.content or "" async for c in answer])
    prompt: Any = f"{one.prompt}="
    if kind == "ids":
        prompt = TOKENIZER.encode(prompt)
    answer = await client.completions.create(prompt=prompt, stream=stream, **body)
    if not stream:
        return str(answer.choices[0].text)
    return "".join([c.choices[0].text async for c in answer])


@pytest.mark.parametrize("sampled", [False, True])
def test_the_text_is_the_same_by_every_way(front: ServedHttp, sampled: bool) -> None:
    every = wanted(7, sampled)
    with Engine(EngineConfig(model=str(MODEL_DIRECTORY), threads=1)) as engine:
        for skill in SKILLS:
            engine.load_adapter(skill.name, adapter_directory(skill.name))
        prompts = [f"{one.prompt}=" for one in every]
        done = engine.generate(prompts, [w.params for w in every], [w.adapter for w in every])
        right = [completion.text for completion in done]
    assert len(set(right)) > COUNT // 2
    nodes = front.addresses("node-")
    assert len(nodes) == 2

    async def test() -> tuple[list[str], list[str]]:
        async with (
            openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="x", max_retries=0) as http,
            AsyncClient(front.addresses("controller")[0]) as sdk,
        ):
            texts = await asyncio.gather(*(by_http(http, one) for one in every))
            completions = await asyncio.gather(
                *(sdk.generate(f"{w.prompt}=", w.params, adapter=w.adapter) for w in every)
            )
            assert len({completion.node_id for completion in completions}) == 2
            return texts, [completion.text for completion in completions]

    by_gateway, by_sdk = asyncio.run(test())
    assert [text.encode() for text in by_sdk] == [(text or "").encode() for text in right]
    assert [text.encode() for text in by_gateway] == [(text or "").encode() for text in right]
