"""Options from the command line, the environment and a file: which wins, and what is refused."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from loraserve import cli
from loraserve.commands import serve
from loraserve.controller import main as controller_main
from loraserve.errors import InvalidArgumentError
from loraserve.gateway import main as gateway_main
from loraserve.node import main as node_main
from loraserve.option_sources import (
    MAX_FILE_BYTES,
    OTHER_VARIABLES,
    SERVE_OPTIONS,
    read_file,
    section_words,
)
from loraserve.serve import processes

FILE = """
model: /models/llama
adapter: {sql: /a/sql, legal: /a/legal}
nodes: 2
port: 8123
served-model-name: [gpt, other]
allow-base-mismatch: true
max-num-seqs: 16
log-level: warning
controller:
  policy: hash
node:
  max_queued_requests: 5
gateway:
  max-body-bytes: 4096
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(FILE)
    return path


def of_serve(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *words])


def test_one_file_drives_the_tree(file: Path) -> None:
    arguments = of_serve("--config", str(file))
    assert arguments.model == Path("/models/llama")
    assert dict(arguments.adapter) == {"sql": Path("/a/sql"), "legal": Path("/a/legal")}
    assert (arguments.nodes, arguments.port) == (2, 8123)
    assert arguments.served_model_name == ["gpt", "other"]
    assert arguments.allow_base_mismatch is True
    assert serve._extra(arguments) == {
        "controller": ("--log-level=warning", "--policy=hash"),
        "node": ("--log-level=warning", "--max-num-seqs=16", "--max-queued-requests=5"),
        "gateway": ("--log-level=warning", "--max-body-bytes=4096"),
    }


def test_the_same_file_drives_each_daemon(file: Path) -> None:
    words = ["--config", str(file)]
    node = node_main._parser().parse_args(words)
    assert node.model == Path("/models/llama")
    assert (node.max_sequences, node.max_queued_requests) == (16, 5)
    assert node.adapter == []
    gateway = gateway_main._parser().parse_args([*words, "--controller", "x:1"])
    assert gateway.tokenizer == Path("/models/llama")
    assert gateway_main._listen(gateway) == "127.0.0.1:8123"
    assert gateway.served_model_name == ["gpt", "other"]
    assert gateway.max_body_bytes == 4096
    controller = controller_main._parser().parse_args([*words, "--data-dir", "d"])
    assert controller.policy == "hash"
    assert {node.log_level, gateway.log_level, controller.log_level} == {"warning"}


def test_the_command_line_wins_then_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASERVE_CONFIG", str(file))
    monkeypatch.setenv("LORASERVE_NODES", "3")
    monkeypatch.setenv("LORASERVE_PORT", "1")
    monkeypatch.setenv("LORASERVE_ADAPTER", "one=/1,two=/2")
    monkeypatch.setenv("LORASERVE_ALLOW_BASE_MISMATCH", "no")
    monkeypatch.setenv("LORASERVE_WHAT_NOBODY_KNOWS", "x")
    arguments = of_serve("--port=2")
    assert (arguments.nodes, arguments.port) == (3, 2)
    assert [name for name, _ in arguments.adapter] == ["one", "two"]
    assert arguments.allow_base_mismatch is False
    arguments = of_serve("--lora-modules", "three=/3", "--config", "/dev/null")
    assert [name for name, _ in arguments.adapter] == ["three"]
    assert arguments.served_model_name == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("- a", "is no mapping"),
        ("nodes: [", "expected"),
        ("nodes: 1\nnodes: 2", "line 2: 'nodes' occurs twice"),
        ("5: 1", "5 is no option's name"),
        ("nodez: 1", "there is no option 'nodez'"),
        ("node: 5", "section node is no mapping"),
        ("!!python/object/apply:os.system ['x']", "could not determine a constructor"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nnodes: *b", "there is no option 'a'"),
        ("nodes: \xff", None),
        ("x" * (MAX_FILE_BYTES + 1), "over"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, wrong: str | None) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidArgumentError) as caught:
        read_file(path)
    assert caught.value.field == "config"
    assert str(path) in caught.value.message
    assert wrong is None or wrong in caught.value.message
    with pytest.raises(InvalidArgumentError, match="config"):
        read_file(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("nodes: many", "--nodes: 'many': invalid literal"),
        ("nodes: [[1]]", "--config: [[1]] is no option's value"),
        ("adapter: [sql]", "--adapter: 'sql': 'sql' is not NAME=DIR"),
        ("log-level: loud", "--log-level: 'loud' is none of debug"),
        ("demo: maybe", "--demo: 'maybe' is not yes or no"),
    ],
)
def test_values_that_cannot_be(
    tmp_path: Path, text: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--config", str(path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"loraserve serve: error: {wrong}")
    assert error.count("\n") == 1


def test_a_daemon_says_what_its_section_has_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.yaml"
    for text, wrong in (
        ("node: {nodez: 1}", "there is no option 'nodez' here"),
        ("node: {threads: x}", "threads: 'x'"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit) as caught:
            node_main.main(["--config", str(path)])
        assert caught.value.code == 2
        assert wrong in capsys.readouterr().err
    monkeypatch.setenv("LORASERVE_THREADS", "few")
    with pytest.raises(SystemExit):
        node_main.main(["--model", "x"])
    assert "from $LORASERVE_THREADS" in capsys.readouterr().err


def test_the_options_of_a_file_are_those_of_serve() -> None:
    parser: Any = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    serve.add_parser(commands)
    names = {
        action.option_strings[0].lstrip("-")
        for action in commands.choices["serve"]._actions
        if action.option_strings and action.help is not argparse.SUPPRESS
    }
    assert names - {"h", "config"} == SERVE_OPTIONS
    shared = {*controller_main._SHARED, *node_main._SHARED, *gateway_main._SHARED}
    assert shared <= SERVE_OPTIONS


def test_sections_as_words() -> None:
    section = {"a_b": 1, "c": True, "d": False, "e": None, "f": ["x", "-y"], "g": {"n": "p"}}
    assert section_words(section) == ["--a-b=1", "--c", "--f=x", "--f=-y", "--g=n=p"]


@pytest.mark.parametrize(
    ("words", "environment", "listen"),
    [
        ([], {}, "127.0.0.1:8123"),
        (["--listen", "127.0.0.1:5"], {}, "127.0.0.1:5"),
        (["--listen", "127.0.0.1:5"], {"HOST": "h", "PORT": "7"}, "127.0.0.1:5"),
        (["--port", "6"], {"LISTEN": "127.0.0.1:5", "HOST": "h"}, "127.0.0.1:6"),
        ([], {"LISTEN": "127.0.0.1:5"}, "127.0.0.1:5"),
        ([], {"PORT": "7"}, "127.0.0.1:7"),
    ],
)
def test_where_a_gateway_listens_is_said_by_one_source(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    environment: dict[str, str],
    listen: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"LORASERVE_{name}", value)
    given = ["--config", str(file), "--controller", "x:1", *words]
    assert gateway_main._listen(gateway_main._parser().parse_args(given)) == listen


def test_daemons_of_a_tree_have_no_options_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PORT", "LISTEN", "KEYS", "API_KEY", "CONFIG", "UCX_PREFIX"):
        monkeypatch.setenv(f"LORASERVE_{name}", "x")
    started: list[dict[str, str]] = []
    monkeypatch.setattr(
        processes.subprocess, "Popen", lambda command, env, **_: started.append(env)
    )
    processes.spawn("gateway", "loraserve.gateway.main", tmp_path, [])
    (environment,) = started
    ours = {name for name in environment if name.startswith("LORASERVE_")}
    assert "LORASERVE_UCX_PREFIX" in ours
    assert ours <= OTHER_VARIABLES
    assert "PATH" in environment


def test_variables_of_the_engine_are_no_options() -> None:
    found: set[str] = set()
    for path in (Path(__file__).parents[2] / "csrc").rglob("*.c[cu]"):
        found |= set(re.findall(r'getenv\("(LORASERVE_\w+)"', path.read_text()))
    assert found
    assert found <= OTHER_VARIABLES
