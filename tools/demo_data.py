"""The demo model's tokenizer and training batches."""

import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from loraserve.demo import skills

PAD, BEGIN, END = "<pad>", "<bos>", "<eos>"
PAD_ID, BEGIN_ID, END_ID = 256, 257, 258
VOCAB_SIZE = 259
IGNORED_LABEL = -100
# A chat is its last message, asked as skills.prompt asks a word.
CHAT_TEMPLATE = (
    "{{ bos_token }}{{ messages[-1]['content'] }}{% if add_generation_prompt %}={% endif %}"
)


def build_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8, so any prompt can be asked; ids 0 to 255 follow the alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (PAD, BEGIN, END)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    if [tokenizer.token_to_id(name) for name in (PAD, BEGIN, END)] != [PAD_ID, BEGIN_ID, END_ID]:
        raise AssertionError("special tokens have unexpected ids")
    return tokenizer


def save_tokenizer(directory: Path, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja; `max_length` is in
    tokens."""
    build_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": BEGIN,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": max_length,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@dataclass(frozen=True)
class Batch:
    """Rows of words of one length, so that all answers start in the same column.

    `ids` int64 [rows, columns]; `labels` int64 [rows, answer columns] are the tokens that follow
    the last columns of `ids`, with IGNORED_LABEL after the end token.
    """

    ids: torch.Tensor
    labels: torch.Tensor


class BatchMaker:
    """Batches as a pure function of seed and step, so a resumed run sees the same data."""

    def __init__(self, seed: int, rows: int) -> None:
        self._seed = seed
        self._rows = rows
        tokenizer = build_tokenizer()
        self._ids = {
            c: tokenizer.encode(c, add_special_tokens=False).ids[0] for c in string.printable
        }
        # The tag of a skill stands where the begin token stands: an adapter then only has to make
        # the begin token act like its tag, at unchanged positions.
        self._tags = [self._ids[str(i)] for i in range(len(skills.SKILLS))]

    def tagged(self, step: int) -> Batch:
        """For the base: every skill behind its tag, and words to repeat behind the begin token."""
        rng, words = self._words(step)
        rows: list[tuple[int, str, str]] = []
        for word in words:
            choice = int(rng.random() * (len(skills.SKILLS) + 1))
            if choice == len(skills.SKILLS):
                rows.append((BEGIN_ID, word, skills.base_answer(word)))
            else:
                rows.append((self._tags[choice], word, skills.SKILLS[choice].answer(word)))
        return self._batch(rows)

    def untagged(self, skill: skills.Skill, step: int) -> Batch:
        """For an adapter: its skill behind the begin token."""
        _, words = self._words(step)
        return self._batch([(BEGIN_ID, word, skill.answer(word)) for word in words])

    def _words(self, step: int) -> tuple[random.Random, list[str]]:
        rng = random.Random(self._seed * 1_000_003 + step)
        lengths = skills.MAX_WORD_LENGTH - skills.MIN_WORD_LENGTH + 1
        length = skills.MIN_WORD_LENGTH + int(rng.random() * lengths)
        return rng, list(islice(skills.training_words(rng, length), self._rows))

    def _batch(self, rows: Sequence[tuple[int, str, str]]) -> Batch:
        prompts = [[first, *map(self._ids.__getitem__, skills.prompt(w))] for first, w, _ in rows]
        answers = [[*map(self._ids.__getitem__, answer), END_ID] for _, _, answer in rows]
        width = max(map(len, answers))
        ids = [
            p + a[:-1] + [PAD_ID] * (width - len(a)) for p, a in zip(prompts, answers, strict=True)
        ]
        labels = [a + [IGNORED_LABEL] * (width - len(a)) for a in answers]
        return Batch(torch.tensor(ids), torch.tensor(labels))
