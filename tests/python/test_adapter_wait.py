"""`loraserve adapter add --wait`: what is told where the time was too short."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from loraserve.cli import main
from loraserve.commands import adapter
from loraserve.demo import adapter_directory
from loraserve.errors import DeadlineExceededError


class Late:
    """A client of a cluster that is not there in time, or whose nodes are not done in time."""

    def __init__(self, late: str) -> None:
        self._late = late
        self.added: list[str] = []
        self.adapters = SimpleNamespace(add=self._add)

    def _add(self, name: str, _: Any, **options: Any) -> Any:
        self.added.append(name)
        return SimpleNamespace(name=name, base="base", revision="r")

    def wait_routable(self, names: Any, *, timeout_s: float) -> None:
        self._be_late("cluster", timeout_s)

    def wait_admitted(self, added: Any, *, timeout_s: float) -> None:
        self._be_late("adapter", timeout_s)

    def _be_late(self, what: str, timeout_s: float) -> None:
        if what == self._late:
            raise DeadlineExceededError("timeout_s", f"{timeout_s:g} s have passed: why")


@pytest.mark.parametrize("late", ["cluster", "adapter"])
def test_the_option_is_named_and_what_became_of_the_adapter(
    late: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Late(late)

    @contextlib.contextmanager
    def connect(_: Any) -> Iterator[Late]:
        yield client

    monkeypatch.setattr(adapter, "connect", connect)
    words = ["adapter", "add", "upper", str(adapter_directory("upper")), "--wait", "5"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "--wait: 5 s have passed: why" in said
    assert "timeout_s" not in said
    assert ("it stays registered" in said) == (client.added == ["upper"]) == (late == "adapter")
