"""What `loraserve serve` refuses before it starts anything."""

from pathlib import Path

import pytest

from loraserve.cli import main
from loraserve.commands import serve as command
from loraserve.serve import processes


@pytest.fixture(autouse=True)
def no_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "spawn", lambda name, *_: pytest.fail(f"{name} was started"))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What it says, as a line of its own."""
    assert main(["serve", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    return said[-1]


def test_a_key_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nokeys"
    said = refused(capsys, "--demo", "--keys", str(path))
    assert said == f"loraserve serve: error: --keys: {path}: No such file or directory"


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

    monkeypatch.setattr(command, "serve", nothing)
    assert main(["serve", "--demo", *(str(file) if w == "FILE" else w for w in words)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (1 if warned else 0), told
    assert all(line.startswith("loraserve: warning: ") for line in told)
    assert all("is not encrypted" in line for line in told)
