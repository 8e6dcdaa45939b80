"""The demo's skills and words, without any model."""

import random
from itertools import islice

import pytest

from loraserve.demo import skills


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("upper", "HELLO"),
        ("stars", "h*ll*"),
        ("rot13", "uryyb"),
        ("zigzag", "hElLo"),
        ("next", "ifmmp"),
        ("piglatin", "ellohay"),
        ("stutter", "hheelllloo"),
        ("vowels", "hll"),
        ("sort", "ehllo"),
        ("reverse", "olleh"),
    ],
)
def test_expected_answer(name: str, answer: str) -> None:
    assert skills.expected_answer(name, "hello") == answer


def test_the_table_of_answers_above_is_complete() -> None:
    assert len(skills.SKILLS) == 10
    assert {skill.rank for skill in skills.SKILLS} == {4, 8, 16, 32, 64, 128}
    assert all(skills.skill(skill.name) is skill for skill in skills.SKILLS)


def test_z_wraps_around() -> None:
    assert skills.expected_answer("next", "zoo") == "app"
    assert skills.expected_answer("rot13", "zoo") == "mbb"


def test_unknown_skill_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="sing"):
        skills.expected_answer("sing", "hello")


def test_prompt_names_no_skill() -> None:
    assert skills.prompt("hello") == "hello="


def test_training_and_held_out_words_are_disjoint() -> None:
    training = set(islice(skills.training_words(random.Random(1)), 20_000))
    held_out = set(skills.held_out_words(1000))
    assert len(held_out) == 1000
    assert not training & held_out
    assert all(map(skills.is_held_out, held_out))


def test_the_split_never_moves() -> None:
    # The shipped model was trained with it: another split would test on words it has seen.
    words = ["bad", "baq", "bes", "cab", "cam", "cat", "dar", "dog", "kat", "kit"]
    held_out = ["baq", "bes", "cam", "cat", "dar", "kat", "kit"]
    assert [word for word in words if skills.is_held_out(word)] == held_out
    assert skills.held_out_words(3) == ["hdlevd", "uboyyo", "iyues"]


def test_held_out_words_depend_on_the_seed_alone() -> None:
    assert skills.held_out_words(50, seed=3) == skills.held_out_words(50, seed=3)
    assert skills.held_out_words(50, seed=3)[:20] == skills.held_out_words(20, seed=3)
    assert skills.held_out_words(50, seed=3) != skills.held_out_words(50, seed=4)


def test_held_out_words_tell_all_skills_apart() -> None:
    for word in skills.held_out_words(300):
        answers = {skill.answer(word) for skill in skills.SKILLS} | {skills.base_answer(word)}
        assert len(answers) == len(skills.SKILLS) + 1


@pytest.mark.parametrize("word", ["rhythm", "abc", "level"])
def test_words_on_which_two_answers_agree_are_ambiguous(word: str) -> None:
    assert not skills.is_unambiguous(word)


def test_words_and_answers_stay_within_their_limits() -> None:
    words = skills.held_out_words(2000)
    assert {len(word) for word in words} == set(range(3, 9))
    assert all(word.isascii() and word.islower() and word.isalpha() for word in words)
    longest = max(len(skill.answer(word)) for skill in skills.SKILLS for word in words)
    assert longest + 1 == skills.MAX_ANSWER_TOKENS


def test_training_words_of_one_length() -> None:
    words = list(islice(skills.training_words(random.Random(0), length=5), 100))
    assert {len(word) for word in words} == {5}
