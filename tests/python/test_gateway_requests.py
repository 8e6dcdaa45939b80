"""Requests over HTTP against a node without a model: what is answered, and what is refused."""

import asyncio
from typing import Any

import pytest
from fake_node import BASE, FakeEngine, until
from http_site import Answer, ask, connected, fronted
from node_calls import run
from oracle.exposition import parsed

from loraserve.demo import MODEL_DIRECTORY
from loraserve.errors import ResourceExhaustedError
from loraserve.node.limits import Limits
from loraserve.text.tokenizer import Tokenizer

PROMPT = [5, 6]
# Of the tokens that the engine answers with; the gateway makes it.
TEXT = Tokenizer.from_directory(MODEL_DIRECTORY).decode([2, 3, 4])
ASKED = {"model": BASE, "prompt": PROMPT, "max_tokens": 3}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "abc"}], "max_tokens": 3}


def test_a_completion() -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with fronted(engine) as server:
            answer = await ask(server.address, "/v1/completions", ASKED)
            assert answer.status == 200
            assert answer.headers["content-type"] == "application/json"
            got = answer.json
            assert got["id"].startswith("cmpl-")
            assert answer.headers["x-request-id"] in got["id"]
            assert got["model"] == BASE
            assert got["choices"] == [
                {
                    "index": 0,
                    "text": TEXT,
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                }
            ]
            assert got["usage"]["prompt_tokens"] == 2
            assert got["usage"]["completion_tokens"] == 3
            assert got["usage"]["total_tokens"] == 5
            assert got["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}

    run(test)


def test_the_length_of_an_answer_has_two_names() -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with fronted(engine) as server:
            for path, body in (("/v1/completions", ASKED), ("/v1/chat/completions", CHAT)):
                bare = {name: value for name, value in body.items() if name != "max_tokens"}
                for given in (
                    {"max_completion_tokens": 2},
                    {"max_completion_tokens": 2, "max_tokens": 2},
                    {"max_completion_tokens": None, "max_tokens": 2},
                    {"max_completion_tokens": 2, "max_tokens": None},
                ):
                    answer = await ask(server.address, path, bare | given)
                    assert answer.status == 200, (given, answer)
                    assert answer.json["usage"]["completion_tokens"] == 2, given
            bare = {"model": BASE, "prompt": PROMPT, "max_completion_tokens": 0}
            answer = await ask(server.address, "/v1/completions", bare)
            assert (answer.status, answer.error["param"]) == (400, "max_completion_tokens")

    run(test)


def test_every_parameter_reaches_the_engine() -> None:
    given: dict[str, Any] = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 11,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 1.0,
        "logit_bias": {"3": -2.0, "4": 50},
        "seed": -5,
        "stop": ["x", "yz"],
        "stop_token_ids": [9, 8],
        "ignore_eos": True,
    }

    async def test() -> None:
        engine = FakeEngine()
        async with fronted(engine) as server:
            body = {**ASKED, **given, "logprobs": 2, "n": 2}
            assert (await ask(server.address, "/v1/completions", body)).status == 200
            both = {**CHAT, **given, "logprobs": True, "top_logprobs": 2, "n": 2}
            assert (await ask(server.address, "/v1/chat/completions", both)).status == 200
            for call in engine.calls:
                params = call["params"]
                for name in set(given) - {"logit_bias", "seed", "stop", "stop_token_ids"}:
                    assert getattr(params, name) == given[name], name
                assert params.logit_bias == {3: -2.0, 4: 50.0}
                assert params.stop == ("x", "yz")
                assert params.stop_token_ids == (9, 8)
                assert params.logprobs == 2
                assert not params.prompt_logprobs
            seeds = sorted(call["params"].seed for call in engine.calls)
            assert seeds == sorted([2**64 - 5, 2**64 - 4] * 2)
            chats = [call["prompt"] for call in engine.calls[2:]]
            assert chats == [[257, *b"abc="]] * 2 or all(len(chat) == 5 for chat in chats)

    run(test)


def test_a_stream_of_events() -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            usage = {"stream": True, "stream_options": {"include_usage": True}}
            answer = await ask(server.address, "/v1/completions", ASKED | usage)
            assert answer.headers["content-type"].startswith("text/event-stream")
            *events, last, done = answer.events
            assert done == "[DONE]"
            assert last["choices"] == []
            assert last["usage"]["total_tokens"] == 5
            texts = [event["choices"][0]["text"] for event in events]
            assert "".join(texts) == TEXT
            reasons = [event["choices"][0]["finish_reason"] for event in events]
            assert reasons == [None] * (len(reasons) - 1) + ["length"]
            assert len({event["id"] for event in (*events, last)}) == 1
            assert all("usage" not in event for event in events)
            every = {"stream": True, "stream_options": {"include_usage": True}}
            every["stream_options"] |= {"continuous_usage_stats": True}
            *events, last, _ = (await ask(server.address, "/v1/completions", ASKED | every)).events
            used = [event["usage"]["completion_tokens"] for event in events]
            assert used == sorted(used)
            assert used[-1] == 3
            chat = (await ask(server.address, "/v1/chat/completions", CHAT | usage)).events
            assert chat[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert chat[0]["object"] == "chat.completion.chunk"
            assert chat[-2]["choices"] == []

    run(test)


# What is refused: (path, what is changed in the body, status, param)
REFUSED: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("/v1/completions", {"model": "absent"}, 404, "model"),
    ("/v1/completions", {"model": "Not A Name"}, 400, "model"),
    ("/v1/completions", {"model": "../../etc/passwd"}, 400, "model"),
    ("/v1/completions", {"model": "other:adapter"}, 400, "model"),
    ("/v1/completions", {"model": "a" * 300}, 400, "model"),
    ("/v1/completions", {"prompt": list(range(128))}, 400, "prompt"),
    ("/v1/completions", {"prompt": "\ud800"}, 400, "prompt"),
    ("/v1/completions", {"max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"max_tokens": -1}, 400, "max_tokens"),
    ("/v1/completions", {"max_completion_tokens": 4}, 400, "max_completion_tokens"),
    ("/v1/completions", {"max_completion_tokens": -1}, 400, "max_completion_tokens"),
    ("/v1/completions", {"min_tokens": 9}, 400, "min_tokens"),
    ("/v1/completions", {"n": 1 << 40}, 400, "n"),
    ("/v1/completions", {"stop": ["x"] * 17}, 400, "stop"),
    ("/v1/completions", {"stop": "x" * 257}, 400, "stop"),
    ("/v1/completions", {"stream_options": {}, "stream": False}, 400, "stream_options"),
    ("/v1/completions", {"response_format": {"type": "json_object"}}, 400, "response_format"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}, 5]}, 400, "messages[1]"),
    ("/v1/chat/completions", {"top_logprobs": 2}, 400, "top_logprobs"),
    ("/v1/chat/completions", {"max_completion_tokens": 4}, 400, "max_completion_tokens"),
    ("/v1/chat/completions", {"tool_choice": "required"}, 400, "tool_choice"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"messages": []}}, 400, None),
    ("/tokenize", {}, 400, "prompt"),
    ("/detokenize", {}, 400, "tokens"),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 403, "lora_path"),
    ("/v1/unload_lora_adapter", {"lora_name": "../x"}, 400, "lora_name"),
]
BODIES = {"/v1/completions": ASKED, "/v1/chat/completions": CHAT}


def test_what_is_wrong_is_named() -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with fronted(engine) as server:
            for path, change, status, param in REFUSED:
                for stream in ({}, {"stream": True}) if path in BODIES else ({},):
                    answer = await ask(server.address, path, BODIES.get(path, {}) | stream | change)
                    assert answer.status == status, (path, change, answer)
                    assert answer.headers["content-type"] == "application/json"
                    assert set(answer.error) == {"message", "type", "param", "code"}
                    if param is not None:
                        assert answer.error["param"] == param, (change, answer.error)
                        assert param in answer.error["message"]
            assert not engine.live

    run(test)


def test_paths_and_methods() -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            for path in ("/", "/v1", "/v1/embeddings", "/v1/completions/", "/..%2f..%2fetc/passwd"):
                answer = await ask(server.address, path, ASKED)
                assert answer.status == 404, path
                assert answer.error["type"] == "invalid_request_error"
            answer = await ask(server.address, "/v1/completions", method="GET")
            assert answer.status == 405
            assert answer.headers["allow"] == "POST"
            for path in ("/health", "/ping", "/version", "/metrics", "/v1/models"):
                got = await ask(server.address, path)
                head = await ask(server.address, path, method="HEAD")
                assert got.status == head.status == 200, path
                assert int(head.headers["content-length"]) > 0 or path in ("/health", "/ping")
            ready = await ask(server.address, "/ready")
            assert ready.status == 200
            text = {"content-type": "text/plain"}
            answer = await ask(server.address, "/v1/completions", ASKED, headers=text)
            assert answer.status == 415

    run(test)


def test_a_full_node_says_when_to_come_back() -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.may_step.clear()
        limits = Limits(max_sequences=1, max_queued_requests=1)
        async with fronted(engine, limits=limits) as server:
            wanted = [
                asyncio.create_task(ask(server.address, "/v1/completions", ASKED))
                for _ in range(12)
            ]
            await until(lambda: any(task.done() for task in wanted), "one is refused")
            engine.may_step.set()
            answers = await asyncio.gather(*wanted)
            codes = sorted(answer.status for answer in answers)
            assert set(codes) == {200, 429}
            for answer in answers:
                if answer.status == 429:
                    assert int(answer.headers["retry-after"]) >= 1
                    assert answer.error["type"] == "rate_limit_error"

    run(test)


class BrokenEngine(FakeEngine):
    """Fails after the first token."""

    def token(self, call: dict[str, Any], index: int) -> int:  # type: ignore[override]
        if index:
            raise ResourceExhaustedError("pages", "are all in use")
        return 7


def test_an_error_in_a_stream_is_its_last_event() -> None:
    async def test() -> None:
        async with fronted(BrokenEngine()) as server:
            body = ASKED | {"stream": True}
            *_, error, done = (await ask(server.address, "/v1/completions", body)).events
            assert error["error"]["param"] == "pages"
            assert done == "[DONE]"
            whole = await ask(server.address, "/v1/completions", ASKED)
            assert whole.status == 429

    run(test)


def test_several_requests_on_one_connection() -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server, connected(server.address) as connection:
            for _ in range(3):
                await connection.request("POST", "/v1/completions", ASKED)
                assert (await connection.answer()).status == 200
            # In one piece, before the first answer is there.
            for _ in range(3):
                await connection.request("POST", "/v1/completions", ASKED | {"stream": True})
            for _ in range(3):
                assert (await connection.answer()).events[-1] == "[DONE]"

    run(test)


def test_tokens_and_texts() -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server:

            async def tokens(**body: Any) -> Answer:
                return await ask(server.address, "/tokenize", body)

            got = (await tokens(prompt="ab", return_token_strs=True)).json
            assert got["count"] == len(got["tokens"]) == 3
            assert got["max_model_len"] == 256
            assert got["token_strs"][1:] == ["a", "b"]
            bare = (await tokens(prompt="ab", add_special_tokens=False)).json
            assert bare["tokens"] == got["tokens"][1:]
            assert bare["token_strs"] is None
            chat = (await tokens(messages=CHAT["messages"])).json
            assert chat["tokens"] == (await tokens(prompt="abc=")).json["tokens"]
            back = await ask(server.address, "/detokenize", {"tokens": got["tokens"]})
            assert back.json == {"prompt": "<bos>ab"}
            both = await tokens(prompt="a", messages=CHAT["messages"])
            assert both.error["param"] == "prompt"

    run(test)


def test_without_a_tokenizer_only_texts_are_missing() -> None:
    async def test() -> None:
        async with fronted(FakeEngine(), tokenizer=None) as server:
            told = ASKED | {"logprobs": 1}
            answer = await ask(server.address, "/v1/completions", told)
            assert answer.json["choices"][0]["logprobs"]["tokens"][0] == "token_id:2"
            for path, body in (
                ("/v1/chat/completions", CHAT),
                ("/v1/completions", ASKED | {"echo": True}),
                ("/tokenize", {"prompt": "x"}),
                ("/detokenize", {"tokens": [1]}),
            ):
                refused = await ask(server.address, path, body)
                assert refused.status == 400
                assert "--tokenizer" in refused.error["message"]

    run(test)


@pytest.mark.parametrize("n", [1, 3])
def test_metrics_count_what_was_answered(n: int) -> None:
    async def test() -> None:
        async with fronted(FakeEngine()) as server:
            for stream in (False, True):
                await ask(server.address, "/v1/completions", ASKED | {"n": n, "stream": stream})
            await ask(server.address, "/nothing/here", ASKED)
            seen = parsed((await ask(server.address, "/metrics")).body.decode())
            requests = "loraserve_gateway_requests_total"
            assert seen.value(requests, path="/v1/completions", status="200") == 2
            assert seen.value(requests, path="other", status="404") == 1
            count = 2.0 * n
            for name, value in (
                ("vllm:generation_tokens_total", 3 * count),
                ("vllm:prompt_tokens_total", 2 * count),
                ("vllm:request_success_total", count),
                ("vllm:time_to_first_token_seconds_count", count),
                ("vllm:e2e_request_latency_seconds_count", count),
                ("vllm:num_requests_running", 0),
                ("vllm:num_requests_waiting", 0),
                ("vllm:kv_cache_usage_perc", 0.1),
                ("loraserve_gateway_ttft_seconds_count", count),
                ("loraserve_gateway_e2e_seconds_count", count),
            ):
                assert seen.value(name) == pytest.approx(value), name
            assert seen.labels("vllm:request_success_total")[0]["finished_reason"] == "length"
            assert len(seen.labels("vllm:lora_requests_info")) == 1

    run(test)
