"""Placements in threads: one that hangs or breaks stops neither the next nor the controller."""

import asyncio
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from controller_fixtures import TICK_S, FakeNode, Site, controller
from fake_node import until

from loraserve.controller import solving
from loraserve.controller.events import PlacementComputed, PlacementFailed
from loraserve.controller.placing import PlacementAnswer, solve
from loraserve.controller.state import Settings

PACKED = b"PACKED base 8 one"
SETTINGS = Settings(tick_seconds=TICK_S, silent_ticks=25, answer_ticks=50, burst_gap_ticks=2)
Solve = Callable[[Any], PlacementAnswer]


class Trap:
    """Takes the place of `solve`; while it is set, what it does instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.instead: Solve | None = None
        self.caught = 0
        monkeypatch.setattr(solving, "solve", self)

    def __call__(self, question: Any) -> PlacementAnswer:
        instead = self.instead
        if instead is None:
            return solve(question)
        self.caught += 1
        return instead(question)


def loses_a_node(
    tmp_path: Path, trap: Trap, instead: Solve, reason: str, free: Callable[[], None]
) -> str:
    """The placement that a lost node asks for is caught in the trap, until another is asked for as
    it failed by `reason`; then what the node held is served elsewhere. What /metrics says at the
    end."""

    async def run() -> str:
        options: dict[str, Any] = {"settings": SETTINGS, "metrics_listen": "127.0.0.1:0"}
        async with controller(tmp_path, **options) as site, FakeNode(site, "n1") as first:
            await site.create("sql", PACKED)
            await site.served("sql", ["n1"])
            async with FakeNode(site, "n2"):
                await placed(site, 2)
                before = failed(site, reason)
                trap.instead = instead
                await first.kill()
                await until(lambda: bool(trap.caught) and failed(site, reason) > before, "failed")
                trap.instead = None
                await site.served("sql", ["n2"])
                free()
                url = f"http://{site.server.metrics_address}/metrics"
                return await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())

    return asyncio.run(asyncio.wait_for(run(), 120))


async def placed(site: Site, nodes: int) -> None:
    """Whole placements have been made with so many nodes, and none is awaited."""
    state = site.server.runtime.state
    while len(state.utilisation) != nodes or site.server.runtime._placing:
        await asyncio.sleep(TICK_S)


def failed(site: Site, reason: str) -> int:
    return site.server.runtime.state.failed_placements.get(reason, 0)


def test_a_placement_that_hangs_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap, freed = Trap(monkeypatch), threading.Event()

    def hang(question: Any) -> PlacementAnswer:
        freed.wait()
        return solve(question)

    text = loses_a_node(tmp_path, trap, hang, "overdue", freed.set)
    assert 'loraserve_placements_failed_total{reason="overdue"}' in text


@pytest.mark.parametrize("error", [ZeroDivisionError("boom"), MemoryError(), SystemExit(3)])
def test_a_placement_that_breaks_is_made_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trap = Trap(monkeypatch)

    def breaks(question: Any) -> PlacementAnswer:
        raise error

    text = loses_a_node(tmp_path, trap, breaks, "error", lambda: None)
    assert 'loraserve_placements_failed_total{reason="error"}' in text
    assert f"placement failed, all stays where it is: {type(error).__name__}" in caplog.text


def test_not_more_and_more_threads_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    trap, freed = Trap(monkeypatch), threading.Event()

    def hang(question: Any) -> PlacementAnswer:
        freed.wait()
        return PlacementAnswer(question, "late")

    trap.instead = hang
    question: Any = object()

    async def run() -> None:
        made = solving.Solving()
        hanging = [asyncio.create_task(made.answer(question)) for _ in range(5)]
        done, left = await asyncio.wait(hanging, return_when=asyncio.FIRST_COMPLETED)
        refused = [task.result() for task in done]
        assert len(left) == solving.MOST_UNANSWERED
        assert all(isinstance(a, PlacementFailed) and "not ended" in a.why for a in refused)
        # Whoever does not wait any more leaves its thread behind, which counts until it ends.
        for task in left:
            task.cancel()
        await asyncio.wait(left)
        assert isinstance(await made.answer(question), PlacementFailed)
        freed.set()
        while isinstance(await made.answer(question), PlacementFailed):
            await asyncio.sleep(0.001)
        assert isinstance(await made.answer(question), PlacementComputed)

    asyncio.run(asyncio.wait_for(run(), 60))
