"""The controller's core, told as transcripts: events above the line, effects below it.

LORASERVE_REWRITE_TRANSCRIPTS=1 writes what the core does now into the files; review the diff.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraserve.controller.events import (
    AdapterAdded,
    AdapterRemoved,
    AdapterUpdated,
    AskRegister,
    Copy,
    DemandSample,
    Effect,
    Event,
    Heartbeat,
    NodeLost,
    NodeRecord,
    NodeRegistered,
    PublishRoutes,
    Residency,
    SavePlacement,
    SendDrop,
    SendLoad,
    Tick,
)
from loraserve.controller.state import ControllerState, Settings
from loraserve.errors import LoraServeError
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec

POLICY = policy_named("rank_aware")
FILES = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))


def adapter(name: str) -> AdapterId:
    return AdapterId("t", "base", name)


def spec(name: str, options: dict[str, str]) -> AdapterSpec:
    size, rank = int(options["size"]), int(options["rank"])
    return AdapterSpec(adapter(name), options["rev"], size, rank)


def show(effect: Effect) -> str:
    match effect:
        case SavePlacement(holders):
            placed = (f"{a.name}:{'+'.join(n)}" for a, n in sorted(holders.items()))
            return f"save {' '.join(placed)}"
        case SendLoad(node, _, s):
            return f"{node} <- load {s.adapter.name}@{s.revision}"
        case SendDrop(node, _, a, revision):
            return f"{node} <- drop {a.name}@{revision}"
        case PublishRoutes(version):
            return f"publish v{version}"
        case NodeLost(node):
            return f"lost {node}"
        case AskRegister(node):
            return f"{node} <- register"


def show_routes(state: ControllerState) -> Iterator[str]:
    for a, route in sorted(state.routes.adapters.items()):
        for r in route.revisions:
            yield f"{a.name}@{r.revision} -> {' '.join(h.node_id for h in r.holders)}"
        if not route.revisions:
            yield f"{a.name}@{route.revision} -> nowhere: {route.unrouted_reason}"


class Play:
    """One transcript's controller; nodes exist in the lines only."""

    def __init__(self) -> None:
        self.state = ControllerState(Settings(), POLICY, epoch=1)
        self.generation = 0
        self.last_load: dict[str, int] = {}

    def restart(self, words: list[str]) -> None:
        histories, placement = [], {}
        for word in words:
            name, options, node = word.split(":")
            histories.append((spec(name, dict(o.split("=") for o in options.split(","))),))
            placement[adapter(name)] = (node,)
        self.state = ControllerState(Settings(), POLICY, 2, histories, placement)

    def event(self, verb: str, name: str, rest: list[str]) -> Event:
        options = dict(word.split("=") for word in rest if "=" in word)
        match verb:
            case "tick":
                return Tick()
            case "node":
                incarnation, rank = options.get("incarnation", "1"), options.get("max_rank", "0")
                memory = int(options["memory"])
                return NodeRegistered(
                    NodeRecord(name, int(incarnation), f"{name}:1", "base", "", memory, int(rank))
                )
            case "beat":
                self.generation += 1
                copies = []
                for word in rest:
                    if "@" in word:
                        held, state = word.split(":")
                        who, revision = held.split("@")
                        copies.append(Copy(adapter(who), revision, Residency[state.upper()]))
                draining = "draining" in rest
                return Heartbeat(name, 1, self.generation, tuple(copies), draining=draining)
            case "fail":
                failed = ((self.last_load[name], " ".join(rest)),)
                return Heartbeat(name, 1, self.generation, failed=failed)
            case "add":
                return AdapterAdded(spec(name, options))
            case "update":
                return AdapterUpdated(spec(name, options))
            case "remove":
                return AdapterRemoved(adapter(name))
        raise ValueError(verb)

    def line(self, line: str) -> Iterator[str]:
        verb, *words = line.split()
        if verb == "restart":
            return self.restart(words)
        if verb == "routes":
            return (yield from show_routes(self.state))
        try:
            effects = self.state.step(self.event(verb, words[0] if words else "", words[1:]))
        except LoraServeError as error:
            return (yield f"{error.reason}: {error}")
        for effect in effects:
            if isinstance(effect, SendLoad):
                self.last_load[effect.node_id] = effect.command_id
            yield show(effect)


def perform(text: str) -> str:
    """The transcript with the effects that the core has now."""
    play, out = Play(), []
    for block in text.split("\n\n"):
        given = [line for line in block.partition("\n----")[0].splitlines() if line]
        out += given
        if "----" in block:
            out.append("----")
        for line in given:
            out += () if line.startswith("#") else list(play.line(line))
        out.append("")
    return "\n".join(out)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_transcript(path: Path) -> None:
    now = perform(path.read_text())
    if os.environ.get("LORASERVE_REWRITE_TRANSCRIPTS"):
        path.write_text(now)
    assert now == path.read_text()


def test_there_are_transcripts() -> None:
    assert len(FILES) >= 4


def test_demand_is_a_smoothed_rate() -> None:
    state = ControllerState(Settings(placement_interval_ticks=10), POLICY, 1)
    state.step(NodeRegistered(NodeRecord("n1", 1, "n1:1", "base", "", 100)))
    sql = AdapterSpec(adapter("sql"), "a1", 10, 8)
    state.step(AdapterAdded(sql))
    for _ in range(10):
        state.step(Heartbeat("n1", 1, 1, demand=(DemandSample(sql.adapter, 300, 100),)))
        state.step(Tick())
    rate = state._demand.rates[sql.adapter]
    assert rate.prefill == pytest.approx(0.8 * 300)
    assert rate.decode == pytest.approx(0.8 * 100)
