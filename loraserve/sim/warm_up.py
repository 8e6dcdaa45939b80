"""What happens before time 0: the controller has long been up, and knows what is asked for."""

from collections.abc import Sequence
from dataclasses import replace

from loraserve.controller.events import DemandSample
from loraserve.placement.types import AdapterSpec
from loraserve.sim.cluster_node import ClusterNode
from loraserve.sim.control import Control
from loraserve.sim.workload import Workload

# Placement intervals before time 0, at most and at least: as many as a budget of bytes may need to
# get there, and until the smoothed demand is within 4 % of what was told.
WARM_INTERVALS = 4
_LEAST_INTERVALS = 2
_MAX_SETTLE_TICKS = 200


def warm_up(
    control: Control,
    nodes: Sequence[ClusterNode],
    specs: Sequence[AdapterSpec],
    workload: Workload | None,
) -> None:
    """Registers the nodes and places; with a workload, for the demand of its first interval."""
    for node in nodes:
        control.register(node)
    _settle(control, nodes)
    if workload is None:
        return
    interval = control.settings.placement_interval_ticks
    demand = _first_demand(workload, specs, interval * control.settings.tick_seconds)
    for number in range(WARM_INTERVALS):
        before = control.commands
        for tick in range(interval):
            # Spread over the interval, as if told by one of the nodes.
            told = tuple(demand[tick::interval])
            if told:
                control.step(replace(nodes[0].beat(), demand=told))
            # Nothing happens on the nodes: they only have to be heard before they count as lost.
            control.tick(nodes if tick % control.settings.silent_ticks == 0 else ())
        _settle(control, nodes)
        if control.commands == before and number + 1 >= _LEAST_INTERVALS:
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


def _first_demand(
    workload: Workload, specs: Sequence[AdapterSpec], seconds: float
) -> list[DemandSample]:
    """Tokens by adapter that the first seconds ask for."""
    seen = workload.time_s < seconds
    tokens: dict[int, tuple[int, int]] = {}
    for adapter, prompt, output in zip(
        workload.adapter[seen].tolist(),
        workload.prompt_tokens[seen].tolist(),
        workload.output_tokens[seen].tolist(),
        strict=True,
    ):
        p, o = tokens.get(adapter, (0, 0))
        tokens[adapter] = p + prompt, o + output
    return [DemandSample(specs[a].adapter, *t) for a, t in sorted(tokens.items())]
