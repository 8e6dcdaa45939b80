"""What a gateway tells Prometheus, and the names that vLLM's routers and dashboards read."""

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraserve.buckets import Buckets
from loraserve.vllm_metrics import AnswerTimes, VllmSample, vllm_families

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.5, 5.0, 10.0, 40.0, 160.0)
TBT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6, 5.0)
E2E_S = (0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)


class GatewayGauges:
    """What others know, asked when Prometheus does. `pages`: (used for KV, all) of the nodes, as
    their last answers told. `adapters`: in the route table. `model_name`: of the base model."""

    def __init__(
        self,
        routes_age_s: Callable[[], float | None],
        routes_version: Callable[[], tuple[int, int]],
        nodes: Callable[[], int],
        connections: Callable[[], int],
        pages: Callable[[], tuple[int, int]],
        adapters: Callable[[], int],
        model_name: Callable[[], str],
    ) -> None:
        self.routes_age_s = routes_age_s
        self.routes_version = routes_version
        self.nodes = nodes
        self.connections = connections
        self.pages = pages
        self.adapters = adapters
        self.model_name = model_name


class GatewayMetrics(Collector):
    """Written on the event loop; read there or in the thread of a metrics server."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """Ended HTTP requests by path and status."""
        self.waiting: Counter[str] = Counter()
        """Answers without their first token, by adapter; "" is the base model."""
        self.running: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        """Ended answers by finish reason."""
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.resumes = 0
        self.ttft = Buckets(TTFT_S)
        self.tbt = Buckets(TBT_S)
        self.e2e = Buckets(E2E_S)
        self.gauges: GatewayGauges | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "loraserve_gateway_requests",
            "HTTP requests that have ended.",
            labels=["path", "status"],
        )
        for (path, status), count in sorted(list(self.requests.items())):
            requests.add_metric([path, str(status)], count)
        yield requests
        waiting, running = (sum(list(c.values())) for c in (self.waiting, self.running))
        yield _gauge("loraserve_gateway_answers_waiting", "Without their first token.", waiting)
        yield _gauge("loraserve_gateway_answers_running", "With their first token.", running)
        yield _counter(
            "loraserve_gateway_prompt_tokens", "Of prompts that were sent.", self.prompt_tokens
        )
        yield _counter("loraserve_gateway_generation_tokens", "Of answers.", self.generated_tokens)
        yield _counter("loraserve_resumes", "Attempts after an answer's first.", self.resumes)
        ttft, tbt = "From a request's arrival to its first token.", "Between an answer's tokens."
        yield self.ttft.family("loraserve_gateway_ttft_seconds", ttft)
        yield self.tbt.family("loraserve_gateway_tbt_seconds", tbt)
        yield from self._of_gauges()
        yield self.e2e.family("loraserve_gateway_e2e_seconds", "From arrival to an answer's end.")
        yield from self._of_vllm()

    def _of_gauges(self) -> Iterator[Metric]:
        gauges = self.gauges
        if gauges is None:
            return
        age = gauges.routes_age_s()
        if age is not None:
            yield _gauge("loraserve_route_table_age_seconds", "Since it was known to hold.", age)
        _, version = gauges.routes_version()
        yield _gauge("loraserve_route_table_version", "Of the table that is routed by.", version)
        yield _gauge("loraserve_gateway_adapters", "In the route table.", gauges.adapters())
        yield _gauge("loraserve_gateway_nodes", "Nodes in the route table.", gauges.nodes())
        yield _gauge("loraserve_gateway_connections", "Open now.", gauges.connections())

    def _of_vllm(self) -> Iterator[Metric]:
        gauges = self.gauges
        used, every = gauges.pages() if gauges else (0, 0)
        sample = VllmSample(
            model_name=gauges.model_name() if gauges else "",
            running=self.running,
            waiting=self.waiting,
            kv_used=used / every if every else 0.0,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generated_tokens,
            finished=self.finished,
            max_adapters=gauges.adapters() if gauges else 0,
        )
        yield from vllm_families(sample, AnswerTimes(self.ttft, self.tbt, self.e2e))


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, value=value)


def _counter(name: str, about: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, about, value=value)
