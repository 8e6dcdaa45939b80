"""What `loraserve serve` refuses before it starts anything."""

from pathlib import Path

import pytest

from loraserve.cli import main
from loraserve.serve import processes


@pytest.fixture(autouse=True)
def no_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "spawn", lambda name, *_: pytest.fail(f"{name} was started"))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What it says, as a line of its own."""
    assert main(["serve", *words]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    return said[-1]


def test_a_key_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nokeys"
    said = refused(capsys, "--demo", "--keys", str(path))
    assert said.startswith(f"loraserve: keys: {path}: cannot be read")
