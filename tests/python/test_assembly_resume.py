"""Text of an answer that goes on elsewhere: the pieces joined are the text of the whole."""

from typing import Any

import pytest
import tokenizer_makers
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.engine.assembly import Assembler, RawOutput
from loraserve.errors import InvalidArgumentError
from loraserve.sampling_params import SamplingParams
from loraserve.text.tokenizer import Tokenizer

PROMPT = "The quick"
TEXTS = st.text("ab END \n日é😀", min_size=1, max_size=24)


@pytest.fixture(scope="module", params=["byte_level_bpe", "byte_fallback_bpe"])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    make = getattr(tokenizer_makers, request.param)
    return Tokenizer.from_directory(make(tmp_path_factory.mktemp(request.param)))


def raw(index: int, token: int, last: bool) -> RawOutput:
    fields: dict[str, Any] = dict.fromkeys(RawOutput.__dataclass_fields__)
    fields |= {"first_index": index, "token_ids": [token], "logprobs": [], "top_logprobs": []}
    fields |= {
        "prompt_logprobs": [],
        "prompt_top_logprobs": [],
        "finish_reason": "length" if last else "",
        "error": None,
    }
    return RawOutput(**fields)


def say(assembler: Assembler, tokens: list[int], first: int, end: int, total: int) -> str:
    """The text of tokens [first, end); stops where a stop string does."""
    text = ""
    for index in range(first, end):
        chunk = assembler.push(raw(index - first, tokens[index], index == total - 1))
        text += chunk.text or ""
        if chunk.finish_reason is not None:
            break
    return text


@settings(max_examples=300, deadline=None)
@given(
    text=TEXTS,
    cut=st.integers(0, 40),
    stops=st.lists(st.sampled_from(["END", "日b", "ab\n"]), max_size=3),
)
def test_what_a_lost_node_held_back_comes_from_the_next(
    tokenizer: Tokenizer, text: str, cut: int, stops: list[str]
) -> None:
    prompt = tokenizer.encode(PROMPT)
    tokens = tokenizer.encode(text)
    params = SamplingParams(stop=stops)
    whole = Assembler(params, prompt, tokenizer, frozenset())
    want = say(whole, tokens, 0, len(tokens), len(tokens))
    cut = min(cut, len(tokens) - 1)
    first = Assembler(params, prompt, tokenizer, frozenset())
    got = say(first, tokens, 0, cut, len(tokens))
    if not first.matched:
        second = Assembler(params, prompt + tokens[:cut], tokenizer, frozenset(), cut)
        got += say(second, tokens, cut, len(tokens), len(tokens))
        assert second.matched == whole.matched
    assert got == want


def test_an_answer_that_had_ended_does_not_go_on(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("ab END")
    ids = tokenizer.encode(PROMPT) + tokens
    with pytest.raises(InvalidArgumentError, match="END"):
        Assembler(SamplingParams(stop=["END"]), ids, tokenizer, frozenset(), len(tokens))
