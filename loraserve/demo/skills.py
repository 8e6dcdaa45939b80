"""What the demo's adapters can do: one visible change of a word each.

The prompt is the word and an equals sign, and does not say which skill is wanted: only the adapter
decides. Without an adapter the base model repeats the word, which is no skill's answer.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MIN_WORD_LENGTH = 3
MAX_WORD_LENGTH = 8
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"

# One answer token per character and the end token; stutter gives the longest answer.
MAX_ANSWER_TOKENS = 2 * MAX_WORD_LENGTH + 1

_HELD_OUT_FRACTION = 8
_CHANCE_TO_SWITCH = 0.75
_ROT13 = str.maketrans("abcdefghijklmnopqrstuvwxyz", "nopqrstuvwxyzabcdefghijklm")
_NEXT = str.maketrans("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza")
_STARS = str.maketrans(VOWELS, "*" * len(VOWELS))
_NO_VOWELS = str.maketrans("", "", VOWELS)


@dataclass(frozen=True)
class Skill:
    """One skill and its adapter's rank. `answer` maps a lower-case word to the exact answer."""

    name: str
    rank: int
    description: str
    answer: Callable[[str], str]


def _zigzag(word: str) -> str:
    return "".join(c.upper() if i % 2 else c for i, c in enumerate(word))


def _stutter(word: str) -> str:
    return "".join(2 * c for c in word)


# Harder skills have higher ranks. The order decides the tags of pre-training: append only.
SKILLS: tuple[Skill, ...] = (
    Skill("upper", 4, "capital letters", str.upper),
    Skill("stars", 4, "a star for each vowel", lambda word: word.translate(_STARS)),
    Skill("rot13", 8, "each letter moved by 13", lambda word: word.translate(_ROT13)),
    Skill("zigzag", 8, "every second letter a capital", _zigzag),
    Skill("next", 16, "each letter's successor", lambda word: word.translate(_NEXT)),
    Skill("piglatin", 16, "first letter to the end, then 'ay'", lambda w: w[1:] + w[0] + "ay"),
    Skill("stutter", 32, "each letter twice", _stutter),
    Skill("vowels", 32, "vowels dropped", lambda word: word.translate(_NO_VOWELS)),
    Skill("sort", 64, "letters in order", lambda word: "".join(sorted(word))),
    Skill("reverse", 128, "backwards", lambda word: word[::-1]),
)

_BY_NAME = {skill.name: skill for skill in SKILLS}


def skill(name: str) -> Skill:
    """The skill of this name; KeyError if there is none."""
    return _BY_NAME[name]


def expected_answer(name: str, word: str) -> str:
    """What the adapter of skill `name` must answer to `prompt(word)`, the end token left out."""
    return _BY_NAME[name].answer(word)


def base_answer(word: str) -> str:
    """What the base model was trained to answer without an adapter."""
    return word


def prompt(word: str) -> str:
    """The text sent to the model; the tokenizer puts the begin token before it."""
    return f"{word}="


def is_held_out(word: str) -> bool:
    """Whether training never sees this word: decided by its hash alone, so for all time."""
    return zlib.crc32(word.encode()) % _HELD_OUT_FRACTION == 0


def is_unambiguous(word: str) -> bool:
    """Whether all skills and the base give different answers, so an answer names its adapter."""
    answers = {base_answer(word), *(skill.answer(word) for skill in SKILLS)}
    return len(answers) == len(SKILLS) + 1


def random_word(rng: random.Random, length: int | None = None) -> str:
    """A word that is more or less pronounceable; every string of `length` letters is possible.

    Draws with `rng.random()` only, the one method whose sequence Python promises to keep.
    """
    if length is None:
        length = MIN_WORD_LENGTH + int(rng.random() * (MAX_WORD_LENGTH - MIN_WORD_LENGTH + 1))
    vowel_next = rng.random() < 0.5
    letters = []
    for _ in range(length):
        choices = VOWELS if vowel_next else CONSONANTS
        letters.append(choices[int(rng.random() * len(choices))])
        vowel_next ^= rng.random() < _CHANCE_TO_SWITCH
    return "".join(letters)


def training_words(rng: random.Random, length: int | None = None) -> Iterator[str]:
    """Endless words of the training side of the split, with repetitions."""
    while True:
        word = random_word(rng, length)
        if not is_held_out(word):
            yield word


def held_out_words(count: int, seed: int = 0) -> list[str]:
    """`count` different unambiguous words that training never saw; the same for the same seed."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        word = random_word(rng)
        if is_held_out(word) and is_unambiguous(word):
            words[word] = None
    return list(words)
