"""What the controller tells Prometheus. Nodes measure requests; here is the cluster as a whole."""

import threading
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraserve.controller.events import Residency
from loraserve.controller.runtime import Runtime
from loraserve.controller.state import ControllerState
from loraserve.errors import InvalidArgumentError, UnavailableError
from loraserve.v1 import common_pb2
from loraserve.wire import is_loopback, split_address


class ControllerMetrics:
    """A registry of its own. `node_load` is called with every heartbeat; the rest is read from the
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

    def observe(self, runtime: Runtime) -> None:
        """Adds the gauges of the core's state."""
        self.registry.register(_ClusterCollector(runtime, self._loads))

    def node_load(self, node_id: str, load: common_pb2.NodeLoad) -> None:
        self._loads[node_id] = load

    def serve(self, address: str) -> "MetricsServer":
        """Serves /metrics by HTTP on loopback. Raises InvalidArgumentError, UnavailableError."""
        host, port = split_address(address, "metrics-listen")
        if not is_loopback(address):
            raise InvalidArgumentError(
                "metrics-listen", f"{address}: metrics carry no key and stay on loopback"
            )
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise UnavailableError("metrics-listen", f"cannot bind {address}: {error}") from None
        return MetricsServer(server, thread)


class MetricsServer:
    """A running /metrics endpoint; `address` is the one that was bound."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        host, port = server.server_address[:2]
        self.address = f"{host!s}:{port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _ClusterCollector(Collector):
    """Runs in the HTTP thread: it takes copies of the core's mappings before it walks them, which
    is atomic under the interpreter lock."""

    def __init__(self, runtime: Runtime, loads: dict[str, common_pb2.NodeLoad]) -> None:
        self._runtime = runtime
        self._loads = loads

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

        queue = GaugeMetricFamily(
            "loraserve_queue_depth", "Requests that wait, by node.", labels=["node"]
        )
        pages = GaugeMetricFamily(
            "loraserve_pages", "Pages of the arena, by use.", labels=["node", "use"]
        )
        resident = GaugeMetricFamily(
            "loraserve_adapter_resident", "Copies of adapters.", labels=["node", "state"]
        )
        for node_id, node in sorted(nodes.items()):
            load = self._loads.get(node_id, common_pb2.NodeLoad())
            queue.add_metric([node_id], load.queued_requests)
            for use in ("kv", "adapter", "free"):
                pages.add_metric([node_id, use], getattr(load, f"{use}_pages"))
            states = [copy.state for copy in list(node.copies.values())]
            for word in Residency:
                resident.add_metric([node_id, word.name.lower()], states.count(word))
        yield from (queue, pages, resident)


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
    yield from (wanted, busy, ignored)


def _counter(name: str, help_: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"loraserve_{name}", help_, value=value)


def _gauge(name: str, help_: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"loraserve_{name}", help_, value=value)
