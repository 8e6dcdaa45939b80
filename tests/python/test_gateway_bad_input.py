"""Hostile requests over HTTP: each is refused with the name of what is wrong, and nothing stays."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from fake_node import BASE, CONTEXT, FakeEngine, until
from http_site import ask, connected, fronted

from loraserve.gateway.connection import BoundedConnection

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": BASE, "prompt": [5, 6], "max_tokens": 3},
    "/v1/chat/completions": {
        "model": BASE,
        "messages": [{"role": "user", "content": "abc"}],
        "max_tokens": 3,
    },
    "/tokenize": {"prompt": "abc"},
    "/detokenize": {"tokens": [5, 6]},
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "x"},
    "/v1/unload_lora_adapter": {"lora_name": "x"},
}


def within(test: Any, timeout_s: float = 120) -> None:
    asyncio.run(asyncio.wait_for(test(), timeout_s))


def names(param: str, field: str) -> bool:
    return param == field or param.startswith(tuple(f"{field}{c}" for c in ".[ "))


def broken(right: dict[str, Any]) -> list[tuple[bytes, str]]:
    """(a body, the field that must be named) for an endpoint that takes `right`."""
    text = json.dumps(right)
    first = next(iter(right))
    return [
        *((data, "body") for data in (b"", b" ", b"{", b"[]", b"null", b"1", b'"x"', b"{}x")),
        *((text[:cut].encode(), "body") for cut in (1, len(text) // 2, len(text) - 1)),
        *((data, "body") for data in (b"\xff", b"\xed\xa0\x80", b'{"\xc3": 1}', b"\xef\xbb\xbf{}")),
        *((text.encode(code), "body") for code in ("utf-16", "utf-32", "utf-16-le")),
        *((data, "body") for data in (b"\0", b"{'x': 1}", b'{"x": 1,}', b'{"x": NaN}', b"{x: 1}")),
        (b'{"x": -Infinity}', "body"),
        (b'{"x": ' + b"9" * 10_000 + b"}", "body"),
        (b'{"x":' * 100_000 + b"1" + b"}" * 100_000, "body"),
        (b"[" * 1_000_000, "body"),
        (b'{"user":' + b"[" * 65 + b"]" * 65 + b"}", "body"),
        (f'{{"{first}": 1, {text[1:]}'.encode(), first),
        (f'{text[:-1]}, "{first}": {json.dumps(right[first])}}}'.encode(), first),
        (f'{text[:-1]}, "no_such_field": null}}'.encode(), "no_such_field"),
        (f'{text[:-1]}, "__class__": 1}}'.encode(), "__class__"),
        (f'{text[:-1]}, "": 1}}'.encode(), '""'),
        (json.dumps(right | {first: {"x": 1}}).encode(), first),
        (b"{}", first),
    ]


def test_what_is_no_body_is_refused_everywhere() -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with fronted(engine) as server, connected(server.address) as client:
            for path, right in BODIES.items():
                for data, field in broken(right):
                    if (path, data) == ("/tokenize", b"{}"):
                        field = "prompt"
                    await client.request("POST", path, data)
                    answer = await client.answer()
                    assert answer.status == 400, (path, data[:80], answer)
                    assert answer.error["param"] == field, (path, data[:80], answer.error)
                    assert len(answer.body) < 1000
            assert not engine.calls

    within(test)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def nested(depth: int) -> Any:
    found: Any = {}
    for _ in range(depth):
        found = {"properties": {"x": found}}
    return found


def billion_laughs(levels: int) -> dict[str, Any]:
    """A JSON Schema that is small, and huge for whoever follows its references."""
    two = [{"$ref": f"#/$defs/{i + 1}"} for i in range(levels)]
    return {"$defs": {str(i): {"allOf": [ref] * 10} for i, ref in enumerate(two)}}


BOMBS: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"tools": [TOOL] * 129}, "tools"),
    ("chat", {"tools": [{"parameters": nested(25)}]}, "tools"),
    ("chat", {"tools": [{"parameters": nested(40)}]}, "body"),
    ("chat", {"chat_template_kwargs": {f"x{i}": 1 for i in range(65)}}, "chat_template_kwargs"),
    ("chat", {"chat_template_kwargs": {"x": nested(25)}}, "chat_template_kwargs"),
    ("chat", {"messages": [{"role": "user", "content": "x", "more": nested(25)}]}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": "x"}] * 10_001}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
    ("chat", {"messages": [{"role": "u", "content": [{"type": "image_url"}]}]}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": "x" * (1 << 15)}]}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages"),
    ("chat", {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ("both", {"response_format": {"type": "json_object"}}, "response_format"),
    (
        "both",
        {"response_format": {"type": "json_schema", "json_schema": billion_laughs(20)}},
        "response_format",
    ),
    ("both", {"guided_json": billion_laughs(20)}, "guided_json"),
    ("both", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ("both", {"logit_bias": {"1\n": 1}}, "logit_bias"),
    ("both", {"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
    ("both", {"logit_bias": {"-1": 1}}, "logit_bias"),
    ("both", {"logit_bias": {"\u0661": 1}}, "logit_bias"),
    ("both", {"logit_bias": {"1": 1e400}}, "body"),
    ("both", {"n": 17}, "n"),
    ("both", {"n": 0}, "n"),
    ("both", {"n": 1.5}, "n"),
    ("both", {"n": "1"}, "n"),
    ("both", {"n": 10**400}, "n"),
    ("text", {"best_of": True}, "best_of"),
    ("both", {"stop": ["x"] * 17}, "stop"),
    ("both", {"stop": [["x"]]}, "stop"),
    ("both", {"stop": "x" * 257}, "stop"),
    ("both", {"stop_token_ids": [1] * 65}, "stop_token_ids"),
    ("both", {"stop_token_ids": [-1]}, "stop_token_ids"),
    ("both", {"seed": 1 << 64}, "seed"),
    ("both", {"temperature": -1}, "temperature"),
    ("both", {"max_tokens": 1 << 40}, "max_tokens"),
    ("both", {"model": "no-such-model"}, "model"),
    ("both", {"model": "x:y:z"}, "model"),
    ("both", {"model": "../secret"}, "model"),
    ("both", {"model": f"{BASE}:../secret"}, "model"),
    ("both", {"model": "\0"}, "model"),
    ("chat", {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ("chat", {"logprobs": 5}, "logprobs"),
    ("text", {"logprobs": 21}, "logprobs"),
    ("text", {"logprobs": True}, "logprobs"),
    ("text", {"prompt": [1] * CONTEXT}, "prompt"),
    ("text", {"prompt": "x" * (1 << 15)}, "prompt"),
    ("text", {"prompt": [[1]] * 257}, "prompt"),
    ("text", {"prompt": [[]]}, "prompt"),
    ("text", {"prompt": [1.0] * (1 << 14)}, "prompt"),
    ("text", {"prompt": "\ud800"}, "prompt"),
]


def test_bombs_and_values_beyond_limits_name_their_field() -> None:
    async def test() -> None:
        engine = FakeEngine()
        async with fronted(engine) as server, connected(server.address) as client:
            for where, change, field in BOMBS:
                for kind, path in (("text", "/v1/completions"), ("chat", "/v1/chat/completions")):
                    if where not in (kind, "both"):
                        continue
                    for stream in (False, True):
                        body = BODIES[path] | change | {"stream": stream}
                        await client.request("POST", path, body)
                        answer = await client.answer()
                        told = (path, str(change)[:80], answer)
                        assert answer.status in (400, 404), told
                        assert names(answer.error["param"], field), told
                        assert len(answer.body) < 1000
            assert not engine.live
            metrics = server._site.metrics
            assert not metrics.running
            assert not metrics.waiting

    within(test)


def test_names_and_paths_of_adapters_lead_nowhere(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    secret.mkdir()
    (root / "link").symlink_to(secret)
    (root / "sql").mkdir()
    paths = ["..", "../secret", "/etc/passwd", "link", "//etc", "sql/../../secret", str(secret)]
    wrong = [
        "../x",
        "..",
        ".x",
        "a/b",
        "a\\b",
        "a\0",
        "x" * 64 + ".",
        "a..b",
        "%2e%2e",
        "A",
        "\u202e",
    ]

    async def test() -> None:
        async with fronted(FakeEngine(), adapter_roots=(root,)) as server:
            load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
            for path in paths:
                answer = await ask(server.address, load, {"lora_name": "x", "lora_path": path})
                assert answer.status == 403, (path, answer)
                assert answer.error["param"] == "lora_path"
                assert "secret" not in answer.error["message"]
            for path in ("a\0b", "x" * 5000):
                answer = await ask(server.address, load, {"lora_name": "x", "lora_path": path})
                assert answer.status == 400, (path, answer)
                assert answer.error["param"] == "lora_path"
            for name in wrong:
                for path, body in ((load, {"lora_path": "sql"}), (unload, {})):
                    answer = await ask(server.address, path, body | {"lora_name": name})
                    assert answer.status == 400, (name, answer)
                    assert answer.error["param"] == "lora_name"
                model = {"model": name, "prompt": [5]}
                answer = await ask(server.address, "/v1/completions", model)
                assert (answer.status, answer.error["param"]) == (400, "model"), (name, answer)
            for path in ("..%2f..%2fetc%2fpasswd", "%00", "..", "%ff", "x" * 5000, "a//b"):
                answer = await ask(server.address, f"/v1/models/{path}")
                assert answer.status == 404, (path, answer)
                assert answer.error["param"] == "model"

    within(test)


@pytest.mark.parametrize("path", ["/no/such/path", "/health", "/v1/completions"])
def test_a_body_that_nobody_reads_must_end_too(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is there before the body; a byte now and then must not keep the connection."""
    monkeypatch.setattr(BoundedConnection, "unread_body_timeout_s", 0.3)
    kind = "text/plain" if path == "/v1/completions" else "application/json"
    head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\n"
    if path == "/v1/completions":
        head = head.replace("GET", "POST")

    async def test() -> None:
        async with fronted(FakeEngine()) as server, connected(server.address) as client:
            await client.send(f"{head}content-length: 1000000\r\n\r\n".encode())
            assert (await client.answer()).status in (200, 404, 415)

            async def drip() -> None:
                with contextlib.suppress(ConnectionError):
                    while True:
                        await client.send(b"x")
                        await asyncio.sleep(0.02)

            dripping = asyncio.create_task(drip())
            assert await client.gone(60) == b""
            dripping.cancel()
            assert server._uvicorn is not None
            state = server._uvicorn.server_state
            await until(lambda: not state.connections, "closed")

    within(test)
