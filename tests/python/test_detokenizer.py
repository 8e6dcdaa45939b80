"""Incremental detokenization against decoding everything at once."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import MAKERS

from loraserve.text.detokenizer import MAX_PENDING, Detokenizer
from loraserve.text.tokenizer import Tokenizer


def _directory(factory: pytest.TempPathFactory, kind: str) -> Path:
    path = factory.getbasetemp() / f"detokenizer-{kind}"
    return path if path.exists() else MAKERS[kind](path)


@pytest.fixture(scope="module", params=list(MAKERS))
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer.from_directory(_directory(tmp_path_factory, request.param))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(_directory(tmp_path_factory, "byte_level_bpe"))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_directory(_directory(tmp_path_factory, "byte_fallback_bpe"))


def _stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], sizes: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, prompt)
    out, start = "", 0
    for size in [*sizes, len(ids)]:
        out += detokenizer.push(ids[start : start + size])
        start += size
    return out + detokenizer.finish()


_TEXT = st.text(
    st.characters(exclude_categories=["Cs"])
    | st.sampled_from(" \n😀👩\u200d👧é語\ufffd")
    | st.sampled_from("the of and hello"),
    max_size=30,
)
_SIZES = st.lists(st.integers(0, 4), max_size=20)


@settings(max_examples=150, deadline=None)
@given(prompt=_TEXT, text=_TEXT, sizes=_SIZES)
def test_pieces_of_any_text_make_the_whole(
    tokenizer: Tokenizer, prompt: str, text: str, sizes: list[int]
) -> None:
    prompt_ids = tokenizer.encode(prompt) if prompt else []
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(prompt_ids + ids)
    assert tokenizer.decode(prompt_ids) + _stream(tokenizer, prompt_ids, ids, sizes) == whole


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 400), max_size=MAX_PENDING), sizes=_SIZES)
def test_any_ids_of_a_byte_level_tokenizer_make_the_whole(
    byte_level: Tokenizer, ids: list[int], sizes: list[int]
) -> None:
    """Broken UTF-8, special and unknown ids among them."""
    assert _stream(byte_level, [], ids, sizes) == byte_level.decode(ids)


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 500), max_size=MAX_PENDING),
    good=st.lists(st.sampled_from(["😀", "é", "語", " a", "the"]), max_size=5),
)
def test_broken_byte_tokens_cost_no_other_character(
    byte_fallback: Tokenizer, ids: list[int], good: list[str]
) -> None:
    """What follows the bad bytes, behind a token that is not a byte, is whole."""
    tail = byte_fallback.encode("x" + "".join(good), add_special_tokens=False)
    text = _stream(byte_fallback, [], ids + tail, [])
    assert text.endswith("x" + "".join(good))


def _emoji_ids(tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(ids) >= 3  # else the tests below show nothing
    return ids


def test_an_incomplete_character_is_held_back(
    byte_level: Tokenizer, byte_fallback: Tokenizer
) -> None:
    for tokenizer in (byte_level, byte_fallback):
        detokenizer = Detokenizer(tokenizer, tokenizer.encode("hi"))
        *begin, last = _emoji_ids(tokenizer)
        for token in begin:
            assert detokenizer.push([token]).strip() == ""
        assert detokenizer.push([last]).endswith("🦊")
        assert detokenizer.finish() == ""


def test_finish_shows_what_is_incomplete(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level)
    assert detokenizer.push(_emoji_ids(byte_level)[:-1]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_the_leading_space_stays_behind_a_prompt(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("hello world", add_special_tokens=False)
    assert Detokenizer(byte_fallback).push(ids) == "hello world"
    prompt = byte_fallback.encode("the")
    assert Detokenizer(byte_fallback, prompt).push(ids) == " hello world"


def test_special_tokens_do_not_cost_the_space_behind_them(byte_fallback: Tokenizer) -> None:
    hello = byte_fallback.encode("hello", add_special_tokens=False)
    end = byte_fallback.eos_ids[0]
    detokenizer = Detokenizer(byte_fallback)
    text = "".join(detokenizer.push([token]) for token in [*hello, *[end] * 50, *hello])
    assert text == "hello hello"


@pytest.mark.parametrize("length", [1, 40])
def test_a_resumed_answer_goes_on_within_a_character(
    byte_level: Tokenizer, byte_fallback: Tokenizer, length: int
) -> None:
    """A second detokenizer that gets the sent tokens as prompt adds exactly what is missing."""
    for tokenizer in (byte_level, byte_fallback):
        prompt = tokenizer.encode("the")
        ids = _emoji_ids(tokenizer) * length
        whole = tokenizer.decode(prompt + ids)
        for cut in range(len(ids)):
            first = Detokenizer(tokenizer, prompt).push(ids[:cut])
            second = Detokenizer(tokenizer, prompt + ids[:cut]).push(ids[cut:])
            assert tokenizer.decode(prompt) + first + second == whole


class _CountingTokenizer(Tokenizer):
    """Remembers the longest list it decoded."""

    longest = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:  # type: ignore[override]
        self.longest = max(self.longest, len(ids))
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("kind", ["byte_level_bpe", "byte_fallback_bpe"])
def test_work_per_token_is_bounded(
    kind: str, bad: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = _CountingTokenizer.from_directory(_directory(tmp_path_factory, kind))
    assert isinstance(tokenizer, _CountingTokenizer)
    ids = _emoji_ids(tokenizer) * 200
    if bad:
        ids = [_emoji_ids(tokenizer)[-1]] * 800
    tokenizer.longest = 0
    detokenizer = Detokenizer(tokenizer)
    text = detokenizer.push(ids) + detokenizer.finish()
    assert tokenizer.longest <= 2 * MAX_PENDING + 2
    text = text.replace(" ", "")  # Llama 2's encoding of one emoji begins with a space
    assert set(text) == {"\ufffd" if bad else "🦊"}
    assert bad or len(text) == 200
