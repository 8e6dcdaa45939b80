"""Files that commands are given and cannot use: one line with the option and the whole path."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from loraserve import cli
from loraserve.controller import main as controller_main
from loraserve.demo import MODEL_DIRECTORY, adapter_directory
from loraserve.gateway import main as gateway_main
from loraserve.node import main as node_main
from loraserve.serve import processes

MAINS = {
    "loraserve-node": node_main.main,
    "loraserve-controller": controller_main.main,
    "loraserve-gateway": gateway_main.main,
}


@pytest.fixture(autouse=True)
def no_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "spawn", lambda name, *_: pytest.fail(f"{name} was started"))


def refused(capfd: pytest.CaptureFixture[str], command: str, *words: object) -> str:
    """What `command` says after "error:", in one line; with exit code 2."""
    texts = [str(word) for word in words]
    daemon = MAINS.get(command)
    try:
        if daemon is None:
            code: object = cli.main([*command.split()[1:], *texts])
        else:
            code = daemon([*texts, "--log-level", "error"])
    except SystemExit as stopped:
        code = stopped.code
    told = capfd.readouterr().err
    assert code == 2, told
    assert told.startswith(f"{command}: error: "), told
    assert len(told.splitlines()) == 1, told
    assert "Errno" not in told
    return told.removeprefix(f"{command}: error: ").rstrip("\n")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Of each kind of trouble one, by name; `absent` is nowhere."""
    found = {name: tmp_path / name for name in ("absent", "empty", "text", "noise", "bytes.gz")}
    found["empty"].mkdir()
    found["text"].write_text("x: [\n  y\n")
    found["noise"].write_bytes(b"\xff\xfe\x00")
    whole = gzip.compress(json.dumps({"timestamp": 0}).encode() * 100)
    found["bytes.gz"] = tmp_path / "cut.jsonl.gz"
    found["bytes.gz"].write_bytes(whole[:20] + b"\0\0\0\0" + whole[24:])
    found["model"] = tmp_path / "model"
    found["model"].mkdir()
    shutil.copy(MODEL_DIRECTORY / "config.json", found["model"])
    return found


SERVE, NODE, CONTROLLER = "loraserve serve", "loraserve-node", "loraserve-controller"
GATEWAY, ADD = "loraserve-gateway", "loraserve adapter add"
FREE = ("--listen", "127.0.0.1:0")
DEMO = ("--model", MODEL_DIRECTORY, *FREE, "--threads", 1)
FRONT = (*FREE, "--controller", "127.0.0.1:1")


@pytest.mark.parametrize(
    ("command", "words", "option", "file", "why"),
    [
        (SERVE, ("--model", "absent"), "--model", "absent", "is no directory"),
        (SERVE, ("absent",), "--model", "absent", "is no directory"),
        (SERVE, ("--model", "empty"), "--model", "empty", "config.json: not found"),
        (SERVE, ("--model", "model"), "--model", "model", "tokenizer.json: is missing"),
        (SERVE, ("--demo", "--adapter", "a=absent"), "--adapter", "absent", "is neither"),
        (SERVE, ("--demo", "--adapter", "a=empty"), "--adapter", "empty", "adapter_config.json"),
        (SERVE, ("--demo", "--keys", "absent"), "--keys", "absent", "No such file"),
        (SERVE, ("--demo", "--keys", "text"), "--keys", "text", "line 1: entry: not JSON"),
        (SERVE, ("--demo", "--chat-template", "noise"), "--chat-template", "noise", "is not text"),
        (SERVE, ("--config", "absent"), "--config", "absent", "No such file or directory"),
        (SERVE, ("--config", "text"), "--config", "text", "while parsing"),
        (SERVE, ("--config", "noise"), "--config", "noise", ""),
        (NODE, ("--model", "absent", *FREE), "--model", "absent", "is no directory"),
        (NODE, ("--model", "empty", *FREE), "--model", "empty", "config.json: not found"),
        (NODE, ("--model", "model", *FREE), "--model", "model", "model.safetensors"),
        (NODE, ("--config", "absent"), "--config", "absent", "No such file or directory"),
        (NODE, (*DEMO, "--keys", "noise"), "--keys", "noise", "is not text"),
        (NODE, (*DEMO, "--peer-key", "text"), "--peer-key", "text", "does not hold one key"),
        (NODE, (*DEMO, "--store", "text"), "--store", "text", "is no directory"),
        (NODE, (*DEMO, "--disk-cache", "text"), "--disk-cache", "text", "File exists"),
        (
            NODE,
            (*DEMO, "--controller", "a:1", "--controller-key", "absent"),
            *("--controller-key", "absent", "No such file or directory"),
        ),
        (
            NODE,
            (*DEMO, "--tls-cert", "absent", "--tls-key", "text"),
            *("--tls-cert", "absent", "No such file or directory"),
        ),
        (
            NODE,
            (*DEMO, "--tls-cert", "text", "--tls-key", "text"),
            *("--tls-cert", "text", "is not a PEM file"),
        ),
        (CONTROLLER, (*FREE, "--data-dir", "text"), "--data-dir", "text", "File exists"),
        (
            CONTROLLER,
            (*FREE, "--data-dir", "empty", "--store", "text"),
            *("--store", "text", "File exists"),
        ),
        (
            CONTROLLER,
            (*FREE, "--data-dir", "empty", "--profile", "./absent"),
            *("--profile", "absent", "No such file or directory"),
        ),
        (
            CONTROLLER,
            (*FREE, "--data-dir", "empty", "--profile", "text"),
            *("--profile", "text", "is not JSON"),
        ),
        (GATEWAY, (*FRONT, "--tokenizer", "absent"), "--tokenizer", "absent", "is no directory"),
        (GATEWAY, (*FRONT, "--tokenizer", "empty"), "--tokenizer", "empty", "tokenizer.json"),
        (GATEWAY, (*FRONT, "--key-file", "absent"), "--key-file", "absent", "No such file"),
        (
            GATEWAY,
            (*FRONT, "--tls-cert", "absent", "--tls-key", "absent"),
            *("--tls-cert", "absent", "No such file or directory"),
        ),
        (ADD, ("a", "absent"), "path", "absent", "is neither a PEFT directory nor"),
        (ADD, ("a", "empty"), "path", "empty", "adapter_config.json: is missing; not a PEFT"),
        (ADD, ("a", "text"), "path", "text", ""),
        (ADD, ("a", MODEL_DIRECTORY), "path", str(MODEL_DIRECTORY), "not a PEFT directory"),
        (
            "loraserve adapter list",
            ("--api-key-file", "absent"),
            *("--api-key-file", "absent", "No such file or directory"),
        ),
        ("loraserve adapter inspect", ("empty",), "path", "empty", "adapter_config.json"),
        (
            "loraserve adapter pack",
            (adapter_directory("upper"), "absent/x"),
            *("target", "absent/x", "No such file or directory"),
        ),
        ("loraserve adapter pack", ("empty", "out"), "source", "empty", "adapter_config.json"),
        (
            "loraserve key create",
            ("me", "--keys", "absent/x"),
            *("--keys", "absent/x", "No such file or directory"),
        ),
        (
            "loraserve node doctor",
            ("--read-from", "absent"),
            *("--read-from", "absent", "No such file or directory"),
        ),
        (
            "loraserve simulate",
            ("--trace", "absent.csv"),
            *("--trace", "absent.csv", "No such file or directory"),
        ),
        ("loraserve simulate", ("--trace", "text"), "--trace", "text", "the name ends in none of"),
        ("loraserve simulate", ("--trace", "cut.jsonl.gz"), "--trace", "cut.jsonl.gz", ""),
        ("loraserve simulate", ("--profile", "noise"), "--profile", "noise", "is not text"),
        (
            "loraserve bench profile",
            ("--model", "empty", "-o", "p.json"),
            *("--model", "empty", "config.json: not found"),
        ),
    ],
)
def test_a_file_that_is_no_use_is_told_by_option_and_path(
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
    words: tuple[object, ...],
    option: str,
    file: str,
    why: str,
) -> None:
    # Relative names, as people give them; told is where they are.
    monkeypatch.chdir(files["empty"].parent)
    told = refused(capfd, command, *words)
    path = Path(file).absolute()
    assert told.startswith(f"{option}: {path}"), told
    assert why in told
    assert told.count(str(path)) == 1, told


def test_a_profile_that_neither_ships_nor_is_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    told = refused(capfd, "loraserve simulate", "--profile", "nonsense")
    assert told.startswith(f"--profile: 'nonsense' is no file ({Path('nonsense').absolute()})")
    assert "a100-llama-3-8b-proportional" in told


def test_wrong_words_are_one_line_too(capfd: pytest.CaptureFixture[str]) -> None:
    assert "--seconds: invalid float" in refused(capfd, "loraserve demo", "--seconds", "x")
    told = refused(capfd, "loraserve adapter add", "a", "b", "--tensor-parallel-size", "2")
    assert "--tensor-parallel-size" in told


def test_what_only_failed_is_exit_code_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--controller", "127.0.0.1:1"]
    assert cli.main(["adapter", "list", *words]) == 1
    told = capfd.readouterr().err
    assert told.startswith("loraserve adapter list: error: --controller: 127.0.0.1:1")
