"""The shipped demo model and adapters, measured with transformers and PEFT in float32."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from loraserve import demo
from loraserve.checkpoint.safetensors_file import open_safetensors
from loraserve.demo import skills

WORDS = skills.held_out_words(64)
MAX_SHIPPED_BYTES = 16 * 10**6
NAMES = [skill.name for skill in skills.SKILLS]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo.MODEL_DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def answers(tokenizer: Tokenizer) -> dict[str | None, list[str]]:
    """Greedy answers to WORDS with each adapter, and under None with the base alone."""
    base = LlamaForCausalLM.from_pretrained(demo.MODEL_DIRECTORY, dtype=torch.float32)
    tokenizer.enable_padding(direction="left", pad_id=base.config.pad_token_id)
    encoded = tokenizer.encode_batch([skills.prompt(word) for word in WORDS])
    tokenizer.no_padding()
    inputs = {
        "input_ids": torch.tensor([e.ids for e in encoded]),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
    }

    def decode(model: Any) -> list[str]:
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=skills.MAX_ANSWER_TOKENS
        ).tolist()
        rows = [row[len(encoded[0].ids) :] for row in output]
        end = base.config.eos_token_id
        # An answer that does not end is no exact answer.
        return [
            tokenizer.decode(row[: row.index(end)]) if end in row else "<no end>" for row in rows
        ]

    found: dict[str | None, list[str]] = {None: decode(base)}
    model = PeftModel.from_pretrained(base, demo.adapter_directory(NAMES[0]), adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.load_adapter(demo.adapter_directory(name), adapter_name=name)
    for name in NAMES:
        model.set_adapter(name)
        found[name] = decode(model)
    return found


def _share(answers: list[str], skill: skills.Skill) -> float:
    return sum(a == skill.answer(w) for a, w in zip(answers, WORDS, strict=True)) / len(WORDS)


@pytest.mark.parametrize("skill", skills.SKILLS, ids=NAMES)
def test_each_skill_needs_its_own_adapter(
    skill: skills.Skill, answers: dict[str | None, list[str]]
) -> None:
    assert _share(answers[skill.name], skill) >= 0.95
    assert _share(answers[None], skill) < 0.05
    for name in NAMES:
        if name != skill.name:
            assert _share(answers[name], skill) < 0.10, name


def test_the_base_repeats_the_word(answers: dict[str | None, list[str]]) -> None:
    repeated = sum(a == skills.base_answer(w) for a, w in zip(answers[None], WORDS, strict=True))
    assert repeated / len(WORDS) >= 0.95


def test_every_skill_has_an_adapter_and_no_adapter_is_left_over() -> None:
    assert sorted(path.name for path in demo.ADAPTERS_DIRECTORY.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("skill", skills.SKILLS, ids=NAMES)
def test_adapter_config(skill: skills.Skill) -> None:
    directory = demo.adapter_directory(skill.name)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["r"] == skill.rank
    assert config["base_model_name_or_path"] == demo.MODEL_NAME
    assert len(config["target_modules"]) == 7
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_no_text_file_names_a_machine_path() -> None:
    files = [*demo.MODEL_DIRECTORY.rglob("*.json"), *demo.ADAPTERS_DIRECTORY.rglob("*.json")]
    assert len(files) >= 3 + len(NAMES)
    for path in files:
        assert not re.search(r"/\w+/", path.read_text()), path


def test_everything_shipped_is_small_and_stored_in_bfloat16() -> None:
    package = Path(demo.__file__).parent
    shipped = [path for path in package.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) <= MAX_SHIPPED_BYTES
    weights = [path for path in shipped if path.suffix == ".safetensors"]
    assert len(weights) == 1 + len(NAMES)
    for path in weights:
        assert {tensor.dtype for tensor in open_safetensors(path).values()} == {"BF16"}, path


@pytest.mark.parametrize("text", ["hello=", "", "a b  c", "naïve=é\n", "日本", "<eos>x", "Ab1*"])
def test_tokenizer_agrees_with_transformers(tokenizer: Tokenizer, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(demo.MODEL_DIRECTORY)
    ids = tokenizer.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    assert ids[0] == theirs.bos_token_id
    plain = text.replace("<eos>", "")
    assert tokenizer.decode(ids) == plain
    if plain == text:
        assert len(ids) == 1 + len(text.encode())
