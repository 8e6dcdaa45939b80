"""What a node tells Prometheus. No series names an adapter: their number has no bound."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraserve.node.adapters import HeldAdapters
from loraserve.node.engine_api import ServedEngine
from loraserve.node.requests import LiveRequests
from loraserve.v1.common_pb2 import ResidencyState

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TBT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class NodeMetrics:
    """A registry of its own. Requests add to the counters; gauges are read when asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "loraserve_requests",
            "Requests that ended, by google.rpc.Code.",
            ["code"],
            registry=self.registry,
        )
        tokens = Counter(
            "loraserve_tokens", "Tokens of prompts and answers.", ["kind"], registry=self.registry
        )
        self.prompt_tokens = tokens.labels("prompt")
        self.generated_tokens = tokens.labels("generated")
        self.ttft = Histogram(
            "loraserve_ttft_seconds",
            "From a request's arrival to its first token.",
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.tbt = Histogram(
            "loraserve_tbt_seconds",
            "Between two tokens of a request.",
            buckets=_TBT_BUCKETS,
            registry=self.registry,
        )
        # The same for the controller, which adds nodes up.
        self.ttft_count = self.tbt_count = 0
        self.ttft_seconds_sum = self.tbt_seconds_sum = 0.0
        self.adapter_load = Histogram(
            "loraserve_adapter_load_seconds",
            "Fetching, checking and installing an adapter.",
            buckets=_LOAD_BUCKETS,
            registry=self.registry,
        )

    def first_token_after(self, seconds: float) -> None:
        """Of a request that arrived so long ago."""
        self.ttft.observe(seconds)
        self.ttft_count += 1
        self.ttft_seconds_sum += seconds

    def token_after(self, seconds: float) -> None:
        """A further token, so long after the one before."""
        self.tbt.observe(seconds)
        self.tbt_count += 1
        self.tbt_seconds_sum += seconds

    def observe(self, engine: ServedEngine, requests: LiveRequests, adapters: HeldAdapters) -> None:
        """Adds the gauges of a node that is ready."""
        self.registry.register(_NodeCollector(engine, requests, adapters))


class _NodeCollector(Collector):
    """Runs in the HTTP thread."""

    def __init__(
        self, engine: ServedEngine, requests: LiveRequests, adapters: HeldAdapters
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._adapters = adapters

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield GaugeMetricFamily(
            "loraserve_queue_depth",
            "Requests that wait for the engine or for their adapter.",
            value=max(0, len(self._requests) - stats.running),
        )
        yield GaugeMetricFamily(
            "loraserve_requests_running", "Requests in the engine's steps.", value=stats.running
        )
        pages = GaugeMetricFamily("loraserve_pages", "Pages of the arena, by use.", labels=["use"])
        pages.add_metric(["kv"], stats.pages_kv)
        pages.add_metric(["adapter"], stats.pages_adapter)
        pages.add_metric(["free"], stats.pages_free)
        yield pages
        resident = GaugeMetricFamily(
            "loraserve_adapter_resident", "Copies of adapters, by state.", labels=["state"]
        )
        counts = self._adapters.count_by_state()
        for name, number in ResidencyState.items():
            if number:
                word = name.removeprefix("RESIDENCY_STATE_").lower()
                resident.add_metric([word], counts[number])
        yield resident
