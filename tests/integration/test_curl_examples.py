"""The curl examples of the documents, run as written: each answers what is shown below it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from served_http import ServedHttp, serving

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/openai.md")
# What the documents start; every one of them serves with these, or fewer.
SERVE = ("--demo", "--adapter-root", "loraserve/demo/adapters")
# And so where a caller has a key.
KEYS = ("--keys", "keys")
# Another at every answer.
OWN = {"id", "created"}

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on PATH")


@dataclass(frozen=True)
class Example:
    document: str
    command: str
    shown: str


def examples() -> list[Example]:
    """Every ```sh block that begins with curl, with the block after it."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        blocks = re.finditer(
            r"^```sh\n(curl .*?)\n```\n+```(?:json|text)\n(.*?)\n```$", text, re.M | re.S
        )
        found += [Example(document, block[1], block[2]) for block in blocks]
    return found


EXAMPLES = [example for example in examples() if "Bearer $" not in example.command]
KEYED = [example for example in examples() if "Bearer $" in example.command]


@pytest.fixture(scope="module")
def served() -> Iterator[ServedHttp]:
    with serving(*SERVE, cwd=ROOT) as found:
        yield found


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The key file that the documents make, and the keys by the names of their variables."""
    path = tmp_path_factory.mktemp("keys")
    made = {}
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for name, words in re.findall(r"^ +([A-Z]+)=\$\(loraserve (key create .*)\)$", text, re.M):
            command = [sys.executable, "-m", "loraserve.cli", *words.split()]
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=path, env=environment(), check=True
            )
            made[name] = done.stdout.strip()
    return path / "keys", made


def environment() -> dict[str, str]:
    """That finds this tree from any directory, as `pip install` does for a user."""
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}


@pytest.fixture(scope="module")
def served_with_keys(keys: tuple[Path, dict[str, str]]) -> Iterator[ServedHttp]:
    with serving(*SERVE, "--keys", str(keys[0]), cwd=ROOT) as found:
        yield found


def test_no_example_is_left_out() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        written = len(re.findall(r"\bcurl -", text))
        assert written == sum(example.document == document for example in EXAMPLES + KEYED) > 0
        starts = re.findall(r"^ +(?:\.venv/bin/)?loraserve serve (--demo.*?)(?: &)?$", text, re.M)
        assert starts, document
        assert all(set(start.split()) <= {*SERVE, *KEYS} for start in starts)


def settled(value: Any) -> Any:
    """Without what is another at every answer, whose form is checked."""
    if isinstance(value, list):
        return [settled(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "created" in value:
        assert re.fullmatch(r"(chat)?cmpl-[0-9a-f]{32}|[a-z0-9._-]+", value["id"])
        assert isinstance(value["created"], int)
        dropped = OWN if "choices" in value else {"created"}
        value = {key: item for key, item in value.items() if key not in dropped}
    return {key: settled(item) for key, item in value.items()}


def joined(events: list[Any]) -> list[Any]:
    """The events of a chat, those with text as one: a step of a busy engine may bring several
    tokens to one of them."""
    found: list[Any] = []
    for event in events:
        text = (
            event["choices"][0]["delta"].get("content")
            if event != "[DONE]" and event["choices"]
            else None
        )
        if text and found and isinstance(found[-1], str):
            found[-1] += text
        else:
            found.append(text or event)
    return found


def meaning(answer: str) -> list[Any]:
    """An answer as what it says: one JSON value, the events of a stream, or the text."""
    if answer.startswith("data: "):
        events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
        return joined(
            [event if event == "[DONE]" else settled(json.loads(event)) for event in events]
        )
    if answer.startswith("{"):
        return [settled(json.loads(answer))]
    return [answer.strip()]


def answered(served: ServedHttp, example: Example, variables: dict[str, str]) -> str:
    port = served.url.rpartition(":")[2]
    done = subprocess.run(
        ["bash", "-c", example.command.replace("localhost:8000", f"localhost:{port}")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | variables,
    )
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.document + ":" + e.command[:44])
def test_it_answers_what_the_document_shows(served: ServedHttp, example: Example) -> None:
    assert meaning(answered(served, example, {})) == meaning(example.shown)


@pytest.mark.skipif(not KEYED, reason="no example has a key")
def test_so_do_those_with_keys_in_their_order(
    served_with_keys: ServedHttp, keys: tuple[Path, dict[str, str]]
) -> None:
    for example in KEYED:
        answer = answered(served_with_keys, example, keys[1])
        assert meaning(answer) == meaning(example.shown), example.command
