"""What `loraserve serve` refuses before it starts anything: in one line, with exit code 2."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml

from loraserve.checkpoint.base_names import names_served_model
from loraserve.checkpoint.packed_adapter import load_adapter_source, write_packed
from loraserve.checkpoint.peft_adapter import read_peft_directory
from loraserve.cli import main
from loraserve.commands import serve as serve_command
from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME, adapter_directory
from loraserve.security import Role, create_key
from loraserve.serve import processes

PREFIX = "loraserve serve: error: "
UPPER = str(adapter_directory("upper"))


@pytest.fixture(autouse=True)
def no_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "spawn", lambda name, *_: pytest.fail(f"{name} was started"))
    monkeypatch.setenv("LORASERVE_PORT", "0")  # whatever else runs on this machine


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """What it says to a command line that it refuses."""

    def ask(*words: str) -> str:
        try:
            code = main(["serve", *words])
        except SystemExit as end:
            code = int(end.code or 0)
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2, lines
        assert len(lines) == 1
        assert lines[0].startswith(PREFIX)
        return lines[0].removeprefix(PREFIX)

    return ask


def adapter(path: Path, into: int = 192, base: str = MODEL_NAME) -> Path:
    """A PEFT directory; the demo's model takes 192."""
    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": base}
    (path / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": np.zeros((2, into), np.float32),
        f"{name}.lora_B.weight": np.zeros((192, 2), np.float32),
    }
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    return path


def test_an_adapter_that_is_not_there_or_none(said: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        line = said("--demo", "--adapter", f"mine={path}")
        assert line.startswith(f"--adapter: {path}: ")
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert "not a packed adapter" in said("--demo", "--adapter", f"mine={tmp_path / 'file'}")


def test_adapters_that_are_named_wrongly(said: Any) -> None:
    assert "argument --adapter/--lora-modules: 'mine' is not NAME=DIR" in said(
        "--demo", "--adapter", "mine"
    )
    twice = ("--adapter", f"one={UPPER}", f"mine={UPPER}", "--lora-modules", f"mine={UPPER}")
    assert said("--demo", *twice) == "--adapter: 'mine' is given twice"
    for name in (MODEL_NAME, "gpt"):
        line = said("--demo", "--served-model-name", "gpt", "--adapter", f"{name}={UPPER}")
        assert line == f"--adapter: {name!r} is a name of the base model"


def test_an_adapter_that_does_not_fit(said: Any, tmp_path: Path) -> None:
    narrow = adapter(tmp_path / "narrow", into=7)
    packed = tmp_path / "narrow.lora"
    write_packed(read_peft_directory(narrow), packed)
    for path in (narrow, packed):
        line = said("--demo", "--allow-base-mismatch", "--adapter", f"mine={path}")
        wanted = "model.layers.0.self_attn.q_proj.lora_A.weight: shape [2, 7]"
        assert line.startswith(f"--adapter: {path}: {wanted}")


def test_an_adapter_of_another_base(said: Any, tmp_path: Path) -> None:
    path = adapter(tmp_path / "other", base="org/another")
    line = said("--demo", "--adapter", f"mine={path}")
    for word in (
        f"--adapter: {path}: ",
        "'org/another'",
        f"'{MODEL_NAME}'",
        "--allow-base-mismatch",
    ):
        assert word in line


def test_the_served_directory_is_the_base_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(MODEL_DIRECTORY)
    for base, same in ((tmp_path / "link", True), (MODEL_DIRECTORY, True), (tmp_path, False)):
        path = adapter(tmp_path / f"to-{base.name}", base=str(base))
        packed = load_adapter_source(path)
        assert names_served_model(packed, MODEL_DIRECTORY) is same
    assert not names_served_model(load_adapter_source(Path(UPPER)), MODEL_DIRECTORY)
    # What says by a digest that it is of other weights is.
    marked = tmp_path / "marked.lora"
    source = read_peft_directory(tmp_path / "to-link")
    write_packed(source, marked, base_digest="ab" * 32)
    assert not names_served_model(load_adapter_source(marked), MODEL_DIRECTORY)


def test_a_port_that_is_taken(said: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = said("--demo", "--port", str(port))
        assert line.startswith(f"--port: cannot listen on 127.0.0.1:{port}: ")


def test_keys_that_cannot_be(said: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    line = said("--demo", "--keys", str(path))
    assert line == f"--keys: {path}: No such file or directory"
    path.write_text("none\n")
    assert said("--demo", "--keys", str(path)).startswith(
        f"--keys: {path}: line 1: entry: not JSON"
    )
    assert said("--demo", "--api-key", "short").startswith("--api-key: needs 8")
    path.unlink()
    create_key(path, "ann", "acme", Role.USER)
    both = said("--demo", "--keys", str(path), "--api-key", "long-enough")
    assert both.startswith("--api-key: excludes --keys")


def test_a_model_without_what_its_parts_need(said: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert said(str(model)).startswith(f"--model: {model}: config.json: not found")
    (model / "config.json").write_text("{}")
    assert said(str(model)).startswith(f"--model: {model}: config.json model_type: ")
    shutil.copy(MODEL_DIRECTORY / "config.json", model)
    assert said(str(model)).startswith(f"--model: {model}: tokenizer.json: is missing")


def test_a_template_and_directories(said: Any, tmp_path: Path) -> None:
    path = tmp_path / "template"
    assert said("--demo", "--chat-template", str(path)).startswith(f"--chat-template: {path}: ")
    path.write_text("{% for %}")
    assert said("--demo", "--chat-template", str(path)).startswith(f"--chat-template: {path}: ")
    line = said("--demo", "--data-dir", str(path / "below"))
    assert line == f"--data-dir: {path}: is no directory"
    assert said("--demo", "--adapter-root", str(path)).startswith("--adapter-root: ")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--device", "tpu"], "--device: 'tpu' is none of cpu, cuda"),
        (["--threads", "-1"], "--threads: -1: at least 0"),
        (["--drain-timeout-s", "-1"], "--drain-timeout-s: -1 is not within"),
        (["--start-timeout-s", "nan"], "--start-timeout-s: nan is not within"),
        (["--max-num-seqs", "0"], "node: --max-sequences: at least 1"),
    ],
)
def test_values_that_a_daemon_would_refuse(said: Any, words: list[str], wanted: str) -> None:
    assert said("--demo", *words).startswith(wanted)


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ({"prot": 8000}, "there is no option 'prot'"),
        ({"nodes": "many"}, "--nodes: 'many': "),
        (
            {"node": {"max-sequence": 3}},
            "node: unrecognized arguments: --max-sequence=3",
        ),
        ({"gateway": {"max-body-bytes": 1}}, "gateway: --max-body-bytes: at least 1024"),
        ({"controller": {"policy": "best"}}, "controller: argument --policy: "),
        ({"adapter": {"mine": "/absent"}}, "--adapter: /absent: "),
    ],
)
def test_a_file_with_a_mistake(
    said: Any, tmp_path: Path, file: dict[str, Any], wanted: str
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"demo": True} | file))
    assert wanted in said("--config", str(path))


def test_a_name_that_a_file_has_twice(said: Any, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("demo: true\nadapter:\n  mine: /one\n  mine: /two\n")
    assert "line 4: 'mine' occurs twice" in said("--config", str(path))


def test_variables_of_the_tree_are_not_those_of_its_daemons(
    said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway alone would take LORASERVE_NODE, which excludes its --controller."""
    monkeypatch.setenv("LORASERVE_NODE", "x:1")
    monkeypatch.setenv("LORASERVE_LOG_LEVEL", "warning")
    assert said("--demo", "--device", "tpu").startswith("--device: ")
    assert said("--demo", "--data-dir", "/dev/null").startswith("--data-dir: ")


def test_mistakes_are_logged_where_logs_are_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(serve_command, "set_up_logs", lambda *_: None)
    monkeypatch.setattr(serve_command._log, "error", lambda *words: told.append(words))
    assert main(["serve", "--demo", "--log-format", "json", "--api-key", "short"]) == 2
    assert len(told) == 1
    assert str(told[0][1]).startswith("--api-key: ")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (["--host", "127.0.0.1"], False),
        (["--host", "0.0.0.0", "--api-key", "a-long-enough-key"], True),
        (["--host", "::", "--api-key", "a-long-enough-key"], True),
        (["--host", "0.0.0.0", "--api-key", "a-long-enough-key", "--config", "FILE"], False),
    ],
)
def test_an_address_that_others_reach_without_tls_is_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    warned: bool,
) -> None:
    file = tmp_path / "tls.yaml"
    file.write_text("gateway: {tls-cert: /cert.pem, tls-key: /key.pem}")

    async def nothing(*_: object) -> None:
        pass

    monkeypatch.setattr(serve_command, "serve", nothing)
    assert main(["serve", "--demo", *(str(file) if w == "FILE" else w for w in words)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (1 if warned else 0), told
    assert all(line.startswith("loraserve: warning: ") for line in told)
    assert all("is not encrypted" in line for line in told)
