"""What happens before time 0: the controller has long been up, and knows what is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraserve.controller.events import DemandSample
from loraserve.placement.types import AdapterSpec
from loraserve.sim.cluster_node import ClusterNode
from loraserve.sim.control import Control
from loraserve.sim.workload import Floats, Ints, Workload

# Placement intervals before time 0, at most and at least: as many as a budget of bytes may need to
# get there.
WARM_INTERVALS = 4
_LEAST_INTERVALS = 2
_MAX_SETTLE_TICKS = 200


def warm_up(
    control: Control,
    nodes: Sequence[ClusterNode],
    specs: Sequence[AdapterSpec],
    workload: Workload | None,
) -> None:
    """Registers the nodes and places; with a workload, for its history, or where it has none for
    the demand of its first interval."""
    for node in nodes:
        control.register(node)
    _settle(control, nodes)
    if workload is None:
        return
    interval = control.settings.placement_interval_ticks
    windows = _windows(workload, interval * control.settings.tick_seconds)
    for number in range(WARM_INTERVALS):
        before = control.commands
        demand = _by_tick(windows[number % len(windows)], specs, interval)
        for tick in range(interval):
            # As if told by one of the nodes.
            if demand[tick]:
                control.step(replace(nodes[0].beat(), demand=demand[tick]))
            control.tick(nodes)
        _settle(control, nodes)
        if len(windows) == 1 and control.commands == before and number + 1 >= _LEAST_INTERVALS:
            return


def _settle(control: Control, nodes: Sequence[ClusterNode]) -> None:
    """Ticks until the controller has asked for nothing for a while."""
    quiet = 0
    for _ in range(_MAX_SETTLE_TICKS):
        before = control.commands
        control.tick(nodes)
        quiet = quiet + 1 if control.commands == before else 0
        if quiet > control.settings.patience_ticks + control.settings.drop_delay_ticks:
            return


@dataclass(frozen=True)
class _Window:
    """Requests of `seconds`: when each came, as a part of them, and what it asked for."""

    seconds: float
    part: Floats
    adapter: Ints
    prompt_tokens: Ints
    output_tokens: Ints


def _windows(workload: Workload, seconds: float) -> list[_Window]:
    """Of the history, in order of time; of the first interval where there is none."""
    source, end_s = workload, min(seconds, workload.duration_s)
    count = 1
    if workload.history is not None:
        source, end_s = workload.history, workload.history.duration_s
        count = min(WARM_INTERVALS, max(1, int(end_s // seconds)))
    length = min(seconds, end_s)
    found = []
    for number in range(count):
        begin = end_s - (count - number) * length
        seen = (source.time_s >= begin) & (source.time_s < begin + length)
        part = (source.time_s[seen] - begin) / length
        columns = (source.adapter, source.prompt_tokens, source.output_tokens)
        found.append(_Window(length, part, *(c[seen] for c in columns)))
    return found


def _by_tick(
    window: _Window, specs: Sequence[AdapterSpec], ticks: int
) -> list[tuple[DemandSample, ...]]:
    """The window, drawn out over so many ticks, as nodes would tell it."""
    told: list[dict[int, tuple[int, int]]] = [{} for _ in range(ticks)]
    columns = (window.part, window.adapter, window.prompt_tokens, window.output_tokens)
    for part, adapter, prompt, output in zip(*(c.tolist() for c in columns), strict=True):
        tick = told[min(int(part * ticks), ticks - 1)]
        p, o = tick.get(adapter, (0, 0))
        tick[adapter] = p + prompt, o + output
    return [
        tuple(DemandSample(specs[a].adapter, *t) for a, t in sorted(tick.items())) for tick in told
    ]
