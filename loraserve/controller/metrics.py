"""What the controller tells Prometheus. Nodes measure requests; here is the cluster as a whole."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraserve.controller.events import DemandSample, Residency
from loraserve.controller.runtime import Runtime
from loraserve.controller.seen import SeenLoad
from loraserve.controller.state import ControllerState
from loraserve.placement.load import LoadModel
from loraserve.v1 import common_pb2


class ControllerMetrics:
    """A registry of its own. `heard` is called with every heartbeat; the rest is read from the
    core when Prometheus asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "loraserve_requests",
            "RPCs that passed the access check, by method.",
            ["method"],
            registry=self.registry,
        )
        self._loads: dict[str, common_pb2.NodeLoad] = {}
        self._seen: SeenLoad | None = None

    def observe(self, runtime: Runtime, load: LoadModel) -> None:
        """Adds the gauges of the core's state. `load`: what placement predicts with."""
        self._seen = SeenLoad(load)
        self.registry.register(_ClusterCollector(runtime, self._loads, self._seen))

    def heard(
        self, node_id: str, load: common_pb2.NodeLoad, demand: Iterable[DemandSample]
    ) -> None:
        """A heartbeat of a node that is registered; called with each."""
        self._loads[node_id] = load
        if self._seen is not None:
            self._seen.heard(node_id, demand)


class _ClusterCollector(Collector):
    """Runs in the HTTP thread: it takes copies of the core's mappings before it walks them, which
    is atomic under the interpreter lock."""

    def __init__(
        self, runtime: Runtime, loads: dict[str, common_pb2.NodeLoad], seen: SeenLoad
    ) -> None:
        self._runtime = runtime
        self._loads = loads
        self._seen = seen

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        state = self._runtime.state
        table, nodes = state.routes, dict(state.nodes)
        yield _gauge("leader_epoch", "Epoch of this controller.", table.epoch)
        yield _gauge("route_table_version", "Version of the route table.", table.version)
        yield _gauge("nodes", "Nodes that are heard of.", len(nodes))
        yield _gauge("adapters", "Adapters in the registry.", len(table.adapters))
        yield _gauge("adapters_unrouted", "Adapters that no node serves.", state.unrouted)
        yield _gauge("moved_bytes", "Asked for in this placement interval.", state.moved_bytes)
        yield _counter("placements", "Whole placements that were made.", state.placements)
        yield from _by_label(state)
        yield from self._commands()
        seen = GaugeMetricFamily(
            "loraserve_seen_utilisation",
            "Of nodes, by what they reported of the last seconds; in the unit of the predicted.",
            labels=["node"],
        )
        for node_id, part in sorted(self._seen.utilisation(state).items()):
            seen.add_metric([node_id], part)
        yield seen

        queue = GaugeMetricFamily(
            "loraserve_queue_depth", "Requests that wait, by node.", labels=["node"]
        )
        pages = GaugeMetricFamily(
            "loraserve_pages", "Pages of the arena, by use.", labels=["node", "use"]
        )
        resident = GaugeMetricFamily(
            "loraserve_adapter_resident", "Copies of adapters.", labels=["node", "state"]
        )
        ttft = SummaryMetricFamily(
            "loraserve_ttft_seconds",
            "From requests' arrivals to their first tokens, by node; its own /metrics has buckets.",
            labels=["node"],
        )
        tbt = SummaryMetricFamily(
            "loraserve_tbt_seconds", "Between two tokens of a request, by node.", labels=["node"]
        )
        for node_id, node in sorted(nodes.items()):
            load = self._loads.get(node_id, common_pb2.NodeLoad())
            ttft.add_metric([node_id], load.ttft_count, load.ttft_seconds_sum)
            tbt.add_metric([node_id], load.tbt_count, load.tbt_seconds_sum)
            queue.add_metric([node_id], load.queued_requests)
            for use in ("kv", "adapter", "free"):
                pages.add_metric([node_id, use], getattr(load, f"{use}_pages"))
            states = [copy.state for copy in list(node.copies.values())]
            for word in Residency:
                resident.add_metric([node_id, word.name.lower()], states.count(word))
        yield from (ttft, tbt, queue, pages, resident)

    def _commands(self) -> Iterator[Metric]:
        runtime = self._runtime
        commands = CounterMetricFamily(
            "loraserve_commands", "That nodes were sent: load, drop.", labels=["kind"]
        )
        commands.add_metric(["load"], runtime.loads_sent)
        commands.add_metric(["drop"], runtime.drops_sent)
        yield commands
        yield _counter(
            "migrations", "Loads of adapters that another node served already.", runtime.migrations
        )


def _by_label(state: ControllerState) -> Iterator[Metric]:
    wanted = GaugeMetricFamily(
        "loraserve_wanted_nodes",
        "Nodes that the demand wants, by base model, as of the last placement.",
        labels=["base"],
    )
    for base, nodes in sorted(dict(state.wanted).items()):
        wanted.add_metric([base], nodes.nodes)
    busy = GaugeMetricFamily(
        "loraserve_predicted_utilisation",
        "Of nodes, as placement predicted it last; 1 is the limit of the SLO.",
        labels=["node"],
    )
    for node_id, part in sorted(dict(state.utilisation).items()):
        busy.add_metric([node_id], part)
    ignored = CounterMetricFamily(
        "loraserve_ignored_reports",
        "Reports of nodes that could not be true, by reason.",
        labels=["reason"],
    )
    for reason, count in sorted(dict(state.ignored).items()):
        ignored.add_metric([reason], count)
    failed = CounterMetricFamily(
        "loraserve_placements_failed",
        "Whole placements that came to nothing, by reason.",
        labels=["reason"],
    )
    for reason, count in sorted(dict(state.failed_placements).items()):
        failed.add_metric([reason], count)
    yield from (wanted, busy, ignored, failed)


def _counter(name: str, help_: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"loraserve_{name}", help_, value=value)


def _gauge(name: str, help_: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"loraserve_{name}", help_, value=value)
