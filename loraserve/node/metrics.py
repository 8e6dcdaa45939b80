"""What a node tells Prometheus. No label is an adapter, but of the one series that vLLM has for
them: the number of adapters has no bound.
"""

import collections
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loraserve.buckets import Buckets
from loraserve.node.adapters import HeldAdapters
from loraserve.node.engine_api import EngineGauges, ServedEngine
from loraserve.node.fetch import FETCHED, SourceResult
from loraserve.node.held import DEVICE
from loraserve.node.requests import LiveRequests
from loraserve.v1.common_pb2 import ResidencyState
from loraserve.vllm_metrics import AnswerTimes, VllmSample, vllm_families

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TBT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_E2E_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 600)
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
        # Their counts and sums go to the controller too, which adds nodes up.
        self.ttft = Buckets(_TTFT_BUCKETS)
        self.tbt = Buckets(_TBT_BUCKETS)
        self.queue_wait = Buckets(_TTFT_BUCKETS)
        self.e2e = Buckets(_E2E_BUCKETS)
        self.times = AnswerTimes(self.ttft, self.tbt, self.e2e, self.queue_wait)
        self.finished: collections.Counter[str] = collections.Counter()
        """Ended answers by finish reason."""
        self.registry.register(_TimesCollector(self.times))
        self.resumed = Counter(
            "loraserve_resumed_requests",
            "Requests that go on here with an answer that another attempt began.",
            registry=self.registry,
        )
        self.adapter_load = Histogram(
            "loraserve_adapter_load_seconds",
            "Fetching and checking an adapter, until the engine has it in host memory.",
            buckets=_LOAD_BUCKETS,
            registry=self.registry,
        )

        self.lookups = Counter(
            "loraserve_adapter_lookups",
            "Requests for an adapter, by whether the host pool had it.",
            ["result"],
            registry=self.registry,
        )
        self._reads = Counter(
            "loraserve_adapter_reads",
            "Attempts to read an adapter from a source: fetched, missing there, corrupt (failed a "
            "check), failed.",
            ["source", "outcome"],
            registry=self.registry,
        )
        self._read_bytes = Counter(
            "loraserve_adapter_read_bytes",
            "Of adapters that were fetched, by source.",
            ["source"],
            registry=self.registry,
        )
        self._read_seconds = Histogram(
            "loraserve_adapter_read_seconds",
            "Reading and checking an adapter, by source.",
            ["source"],
            buckets=_LOAD_BUCKETS,
            registry=self.registry,
        )
        self._peer_reads = Counter(
            "loraserve_peer_reads",
            "Adapters that were read from other nodes, by transport: ucx (one-sided), grpc.",
            ["transport"],
            registry=self.registry,
        )
        self._evictions = Counter(
            "loraserve_adapter_evictions",
            "Copies that made room for others, by the tier that they left.",
            ["tier"],
            registry=self.registry,
        )

    def source_result(self, result: SourceResult) -> None:
        """An attempt to read an adapter ended."""
        self._reads.labels(result.source, result.outcome).inc()
        if result.outcome == FETCHED:
            self._read_bytes.labels(result.source).inc(result.size_bytes)
            self._read_seconds.labels(result.source).observe(result.seconds)

    def peer_read(self, transport: str, size_bytes: int, seconds: float) -> None:
        """An adapter came from another node."""
        self._peer_reads.labels(transport).inc()

    def looked_up(self, hit: bool) -> None:
        self.lookups.labels("hit" if hit else "miss").inc()

    def evicted_from_host(self) -> None:
        self._evictions.labels("host").inc()

    def evicted_from_disk(self) -> None:
        self._evictions.labels("disk").inc()

    def observe(
        self,
        engine: ServedEngine,
        requests: LiveRequests,
        adapters: HeldAdapters,
        base: str,
        max_sequences: int,
    ) -> None:
        """Adds the gauges of a node that is ready, and what vLLM tells of one."""
        self.registry.register(_NodeCollector(engine, requests, adapters))
        self.registry.register(_VllmCollector(self, engine, requests, base, max_sequences))


class _TimesCollector(Collector):
    def __init__(self, times: AnswerTimes) -> None:
        self._times = times

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        times = self._times
        yield times.ttft.family(
            "loraserve_ttft_seconds", "From a request's arrival to its first token."
        )
        yield times.tbt.family("loraserve_tbt_seconds", "Between two tokens of a request.")
        yield times.e2e.family("loraserve_e2e_seconds", "From a request's arrival to its end.")
        if times.queue is not None:
            yield times.queue.family(
                "loraserve_queue_wait_seconds",
                "From a request's arrival to its first step: for its adapter and for the engine.",
            )


class _VllmCollector(Collector):
    """Runs in the HTTP thread."""

    def __init__(
        self,
        metrics: NodeMetrics,
        engine: ServedEngine,
        requests: LiveRequests,
        base: str,
        max_sequences: int,
    ) -> None:
        self._metrics = metrics
        self._engine = engine
        self._requests = requests
        self._base = base
        self._max_sequences = max_sequences

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats, metrics = self._engine.stats(), self._metrics
        running, waiting = self._requests.by_adapter()
        pages = stats.pages_kv + stats.pages_adapter + stats.pages_free
        sample = VllmSample(
            model_name=self._base,
            running=running,
            waiting=waiting,
            kv_used=(stats.pages_kv + stats.pages_adapter) / pages if pages else 0.0,
            prompt_tokens=_value(metrics.prompt_tokens),
            generation_tokens=_value(metrics.generated_tokens),
            finished=metrics.finished,
            max_adapters=self._max_sequences,
            requests_running=stats.running,
            requests_waiting=max(0, len(self._requests) - stats.running),
            preemptions=stats.preemptions,
        )
        yield from vllm_families(sample, metrics.times)


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
        yield from _of_engine(stats)
        yield from _adapters_in_pages(stats)
        yield from self._pool(counts)

    def _pool(self, counts: "collections.Counter[int]") -> Iterator[Metric]:
        host = self._adapters.host
        stats = host.pool.stats()
        copies = GaugeMetricFamily(
            "loraserve_adapter_tier_copies", "Copies of adapters, by tier.", labels=["tier"]
        )
        copies.add_metric(["device"], counts[DEVICE])
        copies.add_metric(["host"], stats.slots)
        copies.add_metric(["disk"], host.disk.files if host.disk else 0)
        yield copies
        pool = GaugeMetricFamily(
            "loraserve_host_pool_bytes",
            "Of the host pool: held, being written, given up but still read, free.",
            labels=["use"],
        )
        pool.add_metric(["held"], stats.held_bytes)
        pool.add_metric(["writing"], stats.writing_bytes)
        pool.add_metric(["quarantined"], stats.quarantined_bytes)
        pool.add_metric(["free"], stats.free_bytes)
        yield pool
        yield GaugeMetricFamily(
            "loraserve_host_pool_largest_free_bytes",
            "The largest adapter that fits without an eviction, about.",
            value=stats.largest_free_bytes,
        )
        yield GaugeMetricFamily(
            "loraserve_host_pool_leased_bytes",
            "Of the host pool, promised to readers on other nodes.",
            value=stats.leased_bytes,
        )
        yield GaugeMetricFamily(
            "loraserve_host_pool_leases", "Promises to readers on other nodes.", value=stats.leases
        )
        yield GaugeMetricFamily(
            "loraserve_disk_cache_bytes",
            "Of the disk cache, in use.",
            value=host.disk.bytes_held if host.disk else 0,
        )


def _value(counter: Counter) -> float:
    for metric in counter.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                return sample.value
    return 0.0


def _of_engine(stats: EngineGauges) -> Iterator[Metric]:
    for name, help_text, value in (
        (
            "preemptions",
            "Requests that gave their pages up, to be computed again.",
            stats.preemptions,
        ),
        (
            "prefix_hit_tokens",
            "Prompt tokens whose KV cache was there already.",
            stats.prefix_hit_tokens,
        ),
        ("steps", "Steps of the engine.", stats.steps),
        (
            "step_seconds",
            "Spent in steps; its rate is the part of the time that the engine works.",
            stats.step_seconds,
        ),
    ):
        yield CounterMetricFamily(f"loraserve_engine_{name}", help_text, value=value)


def _adapters_in_pages(stats: EngineGauges) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "loraserve_adapters_installing",
        "Adapters on their way from host memory into pages.",
        value=stats.adapters_installing,
    )
    for name, help_text, value in (
        ("installs", "Adapters written into pages.", stats.adapter_installs),
        ("page_evictions", "Adapters that made way in pages.", stats.adapter_evictions),
        (
            "install_seconds",
            "Of all installs, from start to end; several may go on at a time.",
            stats.adapter_install_seconds,
        ),
        (
            "waits",
            "Requests that came before their adapter was in pages.",
            stats.adapter_waits,
        ),
        (
            "wait_seconds",
            "Of those requests, until their adapter was in pages.",
            stats.adapter_wait_seconds,
        ),
    ):
        yield CounterMetricFamily(f"loraserve_adapter_{name}", help_text, value=value)
