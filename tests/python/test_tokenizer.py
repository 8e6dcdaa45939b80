"""The tokenizer against transformers' AutoTokenizer on the same directory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import MAKERS, SENTENCES, byte_fallback_bpe, byte_level_bpe
from tokenizers import models
from transformers import AutoTokenizer

from loraserve import demo
from loraserve.errors import InvalidArgumentError, InvalidCheckpointError
from loraserve.text.tokenizer import Tokenizer

Pair = tuple[Tokenizer, Any]


def _pair(path: Path) -> Pair:
    return Tokenizer.from_directory(path), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module", params=[*MAKERS, "shipped"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    if request.param == "shipped":
        return _pair(demo.MODEL_DIRECTORY)
    return _pair(MAKERS[request.param](tmp_path_factory.mktemp(request.param)))


def _assert_same(pair: Pair, text: str) -> None:
    ours, theirs = pair
    for special in (True, False):
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        for skip in (True, False):
            decoded = ours.decode(ids, skip_special_tokens=skip)
            assert decoded == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", [*SENTENCES[:4], "", " ", "  a", "<s>x</s>", "<|end|> y", "\0"])
def test_equals_transformers(pair: Pair, text: str) -> None:
    _assert_same(pair, text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_equals_transformers(pair: Pair, text: str) -> None:
    _assert_same(pair, text)


@settings(max_examples=60, deadline=None)
@given(seeds=st.lists(st.integers(0, 10_000), max_size=20))
def test_any_ids_decode_as_in_transformers(pair: Pair, seeds: list[int]) -> None:
    ours, theirs = pair
    ids = [seed % ours.vocab_size for seed in seeds]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_special_ids_and_size_equal_transformers(pair: Pair) -> None:
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert ours.special_ids == set(theirs.all_special_ids)
    assert ours.special_tokens == theirs.special_tokens_map
    assert not ours.has_text(theirs.eos_token_id)
    assert not ours.has_text(ours.vocab_size)
    assert not ours.has_text(-1)


@pytest.mark.parametrize("maker", [byte_level_bpe, byte_fallback_bpe])
@pytest.mark.parametrize("flag", [True, False])
def test_tokenizer_json_decides_on_bos_and_eos(
    maker: Callable[[Path], Path], flag: bool, tmp_path: Path
) -> None:
    path = maker(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"add_bos_token": flag, "add_eos_token": flag}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    _assert_same(_pair(path), "hello world")


def test_tokens_that_only_the_config_has(tmp_path: Path) -> None:
    path = byte_level_bpe(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|turn_end|>"
    config["additional_special_tokens"] = ["<|tool|>"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = _pair(path)
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == len(theirs)
    _assert_same((ours, theirs), "a<|turn_end|>b<|tool|> c<|end|>")


def test_special_tokens_written_as_objects(tmp_path: Path) -> None:
    path = byte_fallback_bpe(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "</s>", "__type": "AddedToken", "special": True}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_directory(path).eos_ids == (2,)


def test_old_special_tokens_map(tmp_path: Path) -> None:
    path = byte_fallback_bpe(tmp_path)
    (path / "tokenizer_config.json").unlink()
    tokens = {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}
    (path / "special_tokens_map.json").write_text(json.dumps(tokens))
    ours = Tokenizer.from_directory(path)
    assert (ours.bos_id, ours.eos_ids) == (1, (2,))


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    path = byte_level_bpe(tmp_path)
    state = json.loads((path / "tokenizer.json").read_text())
    state["truncation"] = {
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    (path / "tokenizer.json").write_text(json.dumps(state))
    assert len(Tokenizer.from_directory(path).encode("a b c d e f g")) > 2


def test_chat_templates_are_found_in_both_places(tmp_path: Path) -> None:
    path = byte_level_bpe(tmp_path)
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    assert Tokenizer.from_directory(path).chat_templates == {}
    file.write_text(json.dumps(config | {"chat_template": "one"}))
    assert Tokenizer.from_directory(path).chat_templates == {"default": "one"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    file.write_text(json.dumps(config | {"chat_template": named}))
    assert Tokenizer.from_directory(path).chat_templates == {"default": "a", "tool_use": "b"}
    (path / "chat_template.jinja").write_text("file\n")
    assert Tokenizer.from_directory(path).chat_templates == {"default": "file\n"}


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 2}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"extra_special_tokens": "x"}', "extra_special_tokens"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template"),
    ],
)
def test_broken_files_name_the_field(name: str, content: str, field: str, tmp_path: Path) -> None:
    (byte_level_bpe(tmp_path) / name).write_text(content)
    with pytest.raises(InvalidCheckpointError) as caught:
        Tokenizer.from_directory(tmp_path)
    assert field in caught.value.field


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_bad_arguments(pair: Pair) -> None:
    with pytest.raises(InvalidArgumentError, match="text"):
        pair[0].encode("\ud800")
    with pytest.raises(InvalidArgumentError, match="ids"):
        pair[0].decode([-1])


def unigram(**options: Any) -> Tokenizer:
    pieces = [("<unk>", 0.0), ("a", -1.0), ("bc", -2.0)]
    return Tokenizer(tokenizers.Tokenizer(models.Unigram(pieces, **options)), {}, {})


def test_an_unknown_token_may_stand_for_text_of_any_length() -> None:
    # Its neighbours in the text are one token with it.
    assert unigram(unk_id=0).encode("a" + "z" * 100) == [1, 0]
    assert unigram(unk_id=0).longest_token_bytes is None
    assert unigram().longest_token_bytes == len("<unk>")
