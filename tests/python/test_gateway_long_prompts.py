"""Prompts that take long to tokenize: once each, beside the event loop, or not at all."""

import threading
from dataclasses import replace
from typing import Any

import pytest
from fake_node import BASE, FACTS, FakeEngine, serving
from http_site import ask, fronted
from node_calls import run

from loraserve import AsyncClient, SamplingParams
from loraserve.demo import MODEL_DIRECTORY
from loraserve.gateway.logprobs import TokenNames
from loraserve.text.tokenizer import Tokenizer

LONG = "word " * 1000
TOKENIZER = Tokenizer.from_directory(MODEL_DIRECTORY)
ROOMY = 1 << 20


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(text, whether on the main thread) of everything that is tokenized."""
    found: list[tuple[str, bool]] = []
    encode = Tokenizer.encode

    def seen(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        found.append((text, threading.current_thread() is threading.main_thread()))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", seen)
    return found


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"echo": True}, {"stop": ["x"]}, {"stream": True}])
def test_a_long_prompt_is_tokenized_once_and_not_on_the_loop(
    encoded: list[tuple[str, bool]], more: dict[str, Any]
) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with fronted(engine) as server:
            server._site.context_tokens = ROOMY
            encoded.clear()
            body = {"model": BASE, "prompt": [LONG, "short"], "max_tokens": 2, **more}
            await ask(server.address, "/v1/completions", body)
            assert encoded == [(LONG, False), ("short", False)]
            encoded.clear()
            body = {"model": BASE, "prompt": "short", "max_tokens": 2, **more}
            assert (await ask(server.address, "/v1/completions", body)).status == 200
            assert encoded == [("short", True)]
            assert engine.calls[-1]["prompt"] == TOKENIZER.encode("short")

    run(test)


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": LONG}]},
        {"messages": [{"role": "user", "content": "x"}] * 100},
        {"chat_template_kwargs": {"times": 5}},
    ],
)
def test_a_chat_that_may_take_long_is_not_rendered_on_the_loop(
    encoded: list[tuple[str, bool]], more: dict[str, Any]
) -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            server._site.context_tokens = ROOMY
            encoded.clear()
            body = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            await ask(server.address, "/v1/chat/completions", body | more)
            assert [on_loop for _, on_loop in encoded] == [False]
            encoded.clear()
            assert (await ask(server.address, "/v1/chat/completions", body)).status == 200
            assert [on_loop for _, on_loop in encoded] == [True]

    run(test)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_many_logprobs_are_not_written_on_the_loop(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_loop: list[bool] = []
    write = TokenNames.__call__

    def seen(self: TokenNames, token: int) -> str:
        on_loop.append(threading.current_thread() is threading.main_thread())
        return write(self, token)

    monkeypatch.setattr(TokenNames, "__call__", seen)

    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            chat = "chat" in path
            body: dict[str, Any] = {"model": BASE}
            body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
            body |= {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": [5]}
            for tokens, inline in ((300, False), (3, True)):
                on_loop.clear()
                answer = await ask(server.address, path, body | {"max_tokens": tokens})
                assert answer.status == 200
                told = answer.json["choices"][0]["logprobs"]
                assert len(told["content" if chat else "tokens"]) == tokens
                assert set(on_loop) == {inline}

    run(test)


def test_text_that_cannot_fit_is_refused_untokenized(encoded: list[tuple[str, bool]]) -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            longest = TOKENIZER.longest_token_bytes
            assert longest is not None
            server._site.context_tokens = 128
            text = "x" * (128 * longest + 1)
            encoded.clear()
            for path, asked, field in (
                ("/v1/completions", {"prompt": text}, "prompt"),
                (
                    "/v1/chat/completions",
                    {"messages": [{"role": "user", "content": text}]},
                    "messages",
                ),
            ):
                answer = await ask(server.address, path, {"model": BASE, "max_tokens": 2, **asked})
                assert answer.status == 400
                assert answer.error["param"] == field
                assert "context of 128" in answer.error["message"]
            assert not encoded

    run(test)


def test_a_clients_long_prompt_is_not_tokenized_on_its_loop(
    encoded: list[tuple[str, bool]],
) -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with (
            serving(engine, facts=replace(FACTS, context_tokens=ROOMY)) as (server, _),
            AsyncClient(nodes=[server.address], tokenizer=TOKENIZER) as client,
        ):
            params = SamplingParams(max_tokens=3)
            text = "a" * 5000  # few tokens or many: the node says
            encoded.clear()
            got = await client.generate(text, params)
            assert encoded == [(text, False)]
            ids = TOKENIZER.encode(text)
            assert engine.calls[-1]["prompt"] == ids
            assert got.prompt_tokens == len(ids) > FACTS.context_tokens
            assert got.token_ids == [len(ids) + index for index in range(3)]
            assert got.text == TOKENIZER.decode(got.token_ids)
            encoded.clear()
            short = await client.generate("short", params)
            assert encoded == [("short", True)]
            assert short.text == TOKENIZER.decode(short.token_ids)

    run(test)
