"""Text that the client makes itself is that which nodes would send, to the character."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from demo_node import serving_demo
from fake_node import BASE, FakeEngine, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from node_calls import run

from loraserve import SamplingParams
from loraserve.client import AsyncClient
from loraserve.client.local_text import LocalText
from loraserve.demo import MODEL_DIRECTORY
from loraserve.engine.assembly import Assembler, RawOutput
from loraserve.errors import UnavailableError
from loraserve.text.tokenizer import KeptTexts, Tokenizer

TOKENIZER = Tokenizer.from_directory(MODEL_DIRECTORY)


@settings(deadline=None)
@given(
    prompt=st.lists(st.integers(0, 300), max_size=8),
    tokens=st.lists(st.integers(0, 300), min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
    stopped=st.booleans(),
)
def test_it_is_the_nodes_text(
    prompt: list[int], tokens: list[int], cuts: list[int], stopped: bool
) -> None:
    """For any tokens, cut in any way, bad UTF-8 and unknown ids among them."""
    ends = frozenset({tokens[-1]}) if stopped else frozenset()
    if stopped and tokens[-1] in tokens[:-1]:
        return
    node = Assembler(SamplingParams(), prompt, TOKENIZER, ends)
    here = LocalText(TOKENIZER, prompt)
    texts: tuple[list[str], list[str]] = ([], [])
    at = 0
    while at < len(tokens):
        part = tokens[at : at + cuts[at]]
        last = at + len(part) >= len(tokens)
        reason = ("stop" if stopped else "length") if last else ""
        raw = RawOutput(at, part, [], [], [], [], 0, 0.0, reason, None)
        texts[0].append(node.push(raw).text or "")
        texts[1].append(here.push(part, ends=last, end_token=last and stopped))
        at += len(part)
    assert texts[0] == texts[1]


def test_texts_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeptTexts, "MOST", 3)
    kept: KeptTexts[int] = KeptTexts()
    for key in range(10):
        assert kept.put(key, str(key)) == str(key)
        assert kept.get(key) == str(key)
        assert len(kept._texts) <= 3


ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.2, "seed": 5, "ignore_eos": True},
    {"temperature": 0.0, "stop": ("e",)},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, "stop_token_ids": (TOKENIZER.encode("s")[-1],)},
    {"temperature": 1.5, "seed": 9, "min_tokens": 10},
]


def test_answers_are_those_of_a_client_without_a_tokenizer(tmp_path: Path) -> None:
    async def test() -> None:
        async with (
            serving_demo("reverse", "upper") as (server, _),
            AsyncClient(nodes=[server.address]) as plain,
            AsyncClient(nodes=[server.address], multiplex=True, tokenizer=TOKENIZER) as local,
            AsyncClient(nodes=[server.address], tokenizer=TOKENIZER) as alone,
        ):
            for adapter in ("reverse", "upper", None):
                for fields in ASKED:
                    params = SamplingParams(max_tokens=40, **fields)
                    one, two, three = await asyncio.gather(
                        *(
                            c.generate("stressed=", params, adapter=adapter)
                            for c in (plain, local, alone)
                        )
                    )
                    for other in (two, three):
                        assert other.text == one.text
                        assert other.token_ids == one.token_ids
                        assert other.finish_reason == one.finish_reason
                        assert other.stop_reason == one.stop_reason
                        assert other.logprobs == one.logprobs

    run(test)


def test_a_node_that_is_lost_costs_no_text(tmp_path: Path) -> None:
    """The text goes on where it was, on another node."""

    class Letters(FakeEngine):
        @staticmethod
        def token(call: dict[str, Any], index: int) -> int:
            return 65 + (len(call["prompt"]) + index) % 26

    async def test() -> None:
        engines = Letters(), Letters()
        for engine in engines:
            engine.stops_at = 20
        async with serving(engines[0]) as (one, _), serving(engines[1]) as (two, _):
            servers = {s.address: s for s in (one, two)}
            async with AsyncClient(
                nodes=list(servers), multiplex=True, tokenizer=TOKENIZER
            ) as client:
                stream = client.stream([5, 6], SamplingParams(max_tokens=60), base=BASE)
                texts = []
                async for chunk in stream:
                    texts.append(chunk.text)
                    if engines[0].stops_at and chunk.first_index + len(chunk.token_ids) >= 5:
                        for engine in engines:
                            engine.stops_at = None
                        used = next(a for a, s in servers.items() if len(s.node.requests))
                        ended = servers[used].node.requests.end_all(
                            UnavailableError("node", "goes")
                        )
                        assert ended == 1
                done = stream.completion()
                assert done.attempts == 2
                assert "".join(texts) == done.text == TOKENIZER.decode(done.token_ids)
                assert done.token_ids == [65 + (2 + i) % 26 for i in range(60)]

    run(test)
