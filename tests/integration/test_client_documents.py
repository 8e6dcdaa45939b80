"""What the clients of other projects are run by stands in the document, with the right words."""

import json

import pytest
from client_venv import WORDS_FILE, documented

from loraserve.demo.skills import held_out_words, prompt, skill


@pytest.mark.parametrize("program", ["aiperf", "guidellm", "lm_eval"])
def test_a_block_installs_and_runs_it(program: str) -> None:
    requirement, script = documented(program)
    assert requirement.startswith(program)
    assert "==" in requirement
    assert script


def test_words_are_those_of_the_demo() -> None:
    rows = [json.loads(line) for line in WORDS_FILE.read_text().splitlines()]
    assert rows == [
        {
            "prompt": prompt(word),
            "word": word,
            "answer": skill("reverse").answer(word),
            "shouted": skill("upper").answer(word),
        }
        for word in held_out_words(len(rows))
    ]
