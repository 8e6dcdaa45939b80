"""The controller's core, told as transcripts: events above the line, effects below it.

LORASERVE_REWRITE_TRANSCRIPTS=1 writes what the core does now into the files; review the diff.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from loraserve.controller.events import (
    AdapterAdded,
    AdapterRemoved,
    AdapterUpdated,
    AskRegister,
    AskResidency,
    Copy,
    DemandSample,
    Effect,
    Event,
    Heartbeat,
    LinkLost,
    NodeLost,
    NodeRecord,
    NodeRegistered,
    PublishRoutes,
    Residency,
    SavePlacement,
    SendDrop,
    SendLoad,
    TellOperator,
    Tick,
)
from loraserve.controller.state import ControllerState, Settings
from loraserve.errors import LoraServeError
from loraserve.placement.policies import policy_named
from loraserve.placement.types import AdapterId, AdapterSpec, in_order

POLICY = policy_named("rank_aware")
FILES = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))


def adapter(name: str) -> AdapterId:
    return AdapterId("t", "base", name)


def spec(name: str, options: dict[str, str]) -> AdapterSpec:
    size, rank = int(options["size"]), int(options["rank"])
    return AdapterSpec(adapter(name), options["rev"], size, rank)


def show(effect: Effect) -> str:
    match effect:
        case SavePlacement(holders, _, removed):
            placed = [f"{a.name}:{'+'.join(n)}" for a, n in holders.items()]
            return f"save {' '.join([*placed, *(f'{a.name}:nowhere' for a in removed)])}"
        case SendLoad(node, _, s, peers):
            source = f" from {' '.join(p.node_id for p in peers)}" if peers else ""
            return f"{node} <- load {s.adapter.name}@{s.revision}{source}"
        case SendDrop(node, _, a, revision):
            return f"{node} <- drop {a.name}@{revision}"
        case PublishRoutes(version, delta):
            changed = [r.adapter.name for r in delta.adapters]
            changed += [f"-{a.name}" for a in delta.removed_adapters]
            changed += [n.node_id for n in delta.nodes] + [f"-{n}" for n in delta.removed_nodes]
            return f"publish v{version}: {' '.join(changed)}"
        case NodeLost(node):
            return f"lost {node}"
        case AskRegister(node):
            return f"{node} <- register"
        case AskResidency(node):
            return f"{node} <- say everything"
        case TellOperator(message):
            return f"tell: {message}"


def show_routes(state: ControllerState) -> Iterator[str]:
    for a in in_order(state.routes.adapters):
        route = state.routes.adapters[a]
        for r in route.revisions:
            held = (h.node_id + (f"*{h.weight}" if h.weight != 100 else "") for h in r.holders)
            yield f"{a.name}@{r.revision} -> {' '.join(held)}"
        if not route.revisions:
            yield f"{a.name}@{route.revision} -> nowhere: {route.unrouted_reason}"


def number(text: str) -> float:
    return float(text) if text in ("nan", "inf") else int(text)


@dataclass
class Told:
    """A node that exists in the lines only. One that obeys holds at its next heartbeat what it was
    told to. `demand`: tokens (prefill, decode) of each heartbeat."""

    copies: dict[tuple[str, str], Residency] = field(default_factory=dict)
    demand: dict[str, tuple[float, float]] = field(default_factory=dict)
    obeys: bool = False
    generation: int = 0
    applied: int = 0
    last_load: int = 0

    def obey(self, command: SendLoad | SendDrop) -> None:
        self.applied = command.command_id
        if isinstance(command, SendLoad):
            self.copies[command.spec.adapter.name, command.spec.revision] = Residency.HOST
        else:
            self.copies.pop((command.adapter.name, command.revision), None)


class Play:
    """One transcript's controller."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.nodes: dict[str, Told] = {}
        self.state = ControllerState(self.settings, POLICY, 1)

    # Lines that are no event

    def with_settings(self, words: list[str]) -> None:
        given = {k: int(v) for k, v in (word.split("=") for word in words)}
        self.settings = replace(Settings(), **given)
        self.state = ControllerState(self.settings, POLICY, 1)

    def restart(self, words: list[str]) -> None:
        histories, placement = [], {}
        for word in words:
            name, options, nodes = word.split(":")
            histories.append((spec(name, dict(o.split("=") for o in options.split(","))),))
            placement[adapter(name)] = tuple(nodes.split("+"))
        for node in self.nodes.values():
            node.applied = 0
        self.state = ControllerState(self.settings, POLICY, 2, histories, placement)

    def use(self, words: list[str]) -> None:
        """Demand of each heartbeat from now on: NODE NAME=PREFILL+DECODE..."""
        name, *samples = words
        demand = self.nodes[name].demand = {}
        for sample in samples:
            who, counts = sample.split("=")
            prefill, decode = map(number, counts.split("+"))
            demand[who] = (prefill, decode)

    def passes(self, count: int, names: list[str]) -> Iterator[Effect]:
        """So many periods: these nodes say what they said before, then time passes."""
        for _ in range(count):
            for name in names:
                yield from self.step(self.beat(name))
            yield from self.step(Tick())

    # Events

    def beat(self, name: str, **fields: Any) -> Heartbeat:
        node = self.nodes[name]
        node.generation += 1
        copies = tuple(Copy(adapter(a), r, state) for (a, r), state in node.copies.items())
        demand = tuple(DemandSample(adapter(a), p, d) for a, (p, d) in node.demand.items())
        given: dict[str, Any] = {"applied_command": node.applied, "demand": demand}
        return Heartbeat(name, 1, node.generation, copies, **(given | fields))

    def delta(self, name: str, rest: list[str], options: dict[str, str]) -> Heartbeat:
        """NAME@REVISION:STATE changed, -NAME@REVISION went, since=GENERATION."""
        node = self.nodes[name]
        node.generation += 1
        copies, removed = [], []
        for word in rest:
            if word.startswith("-"):
                who, revision = word[1:].split("@")
                removed.append((adapter(who), revision))
            elif "@" in word:
                copies.append(self.copy(word))
        since = int(options.get("since", node.generation - 1))
        return Heartbeat(
            name, 1, node.generation, tuple(copies), since_generation=since, removed=tuple(removed)
        )

    @staticmethod
    def copy(word: str) -> Copy:
        held, state = word.split(":")
        who, revision = held.split("@")
        return Copy(adapter(who), revision, Residency[state.upper()])

    def event(self, verb: str, name: str, rest: list[str]) -> Event:
        options = dict(word.split("=") for word in rest if "=" in word)
        match verb:
            case "tick":
                return Tick()
            case "node":
                self.nodes[name] = Told(obeys="obeys" in rest)
                record = NodeRecord(
                    name,
                    int(options.get("incarnation", "1")),
                    f"{name}:1",
                    "base",
                    "",
                    int(options["memory"]),
                    int(options.get("max_rank", "0")),
                    options.get("domain", ""),
                    float(options.get("speed", "1")),
                )
                return NodeRegistered(record, int(options.get("heard_epoch", "0")))
            case "beat":
                node = self.nodes.setdefault(name, Told())
                copies = [self.copy(word) for word in rest if "@" in word]
                node.copies = {(c.adapter.name, c.revision): c.state for c in copies}
                applied = int(options.get("applied", "0"))
                epoch = int(options.get("epoch", "0"))
                draining = "draining" in rest
                return self.beat(name, draining=draining, applied_command=applied, epoch=epoch)
            case "delta":
                return self.delta(name, rest, options)
            case "unlink":
                return LinkLost(name, 1)
            case "fail":
                return self.beat(name, failed=((self.nodes[name].last_load, " ".join(rest)),))
            case "add":
                return AdapterAdded(spec(name, options))
            case "update":
                return AdapterUpdated(spec(name, options))
            case "remove":
                return AdapterRemoved(adapter(name))
        raise ValueError(verb)

    def step(self, event: Event) -> list[Effect]:
        effects = self.state.step(event)
        for effect in effects:
            if isinstance(effect, SendLoad | SendDrop):
                node = self.nodes[effect.node_id]
                if isinstance(effect, SendLoad):
                    node.last_load = effect.command_id
                if node.obeys:
                    node.obey(effect)
        return effects

    def line(self, line: str) -> Iterator[str]:
        verb, *words = line.split()
        match verb:
            case "settings":
                return self.with_settings(words)
            case "restart":
                return self.restart(words)
            case "use":
                return self.use(words)
            case "routes":
                return (yield from show_routes(self.state))
            case "ignored":
                return (yield from (f"{why}: {n}" for why, n in sorted(self.state.ignored.items())))
            case "wanted":
                return (yield from (w.reason for w in self.state.wanted.values()))
            case "pass":
                count, *names = words
                return (yield from map(show, self.passes(int(count), names)))
        try:
            effects = self.step(self.event(verb, words[0] if words else "", words[1:]))
        except LoraServeError as error:
            return (yield f"{error.reason}: {error}")
        yield from map(show, effects)


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
