"""The metrics of vLLM that routers and dashboards read, under their names there.

Every series but `vllm:lora_requests_info` has the label `model_name`, by which vLLM's dashboards
choose: the name of the base model.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from loraserve.buckets import Buckets

# Names in one label of vllm:lora_requests_info; those with the most requests are told.
MAX_NAMED = 256
_LABEL = "model_name"
# vLLM's words for the ends of requests.
_REASONS = {"cancelled": "abort"}


@dataclass
class AnswerTimes:
    """Histograms in seconds, written by the process that answers. `queue` is None where that does
    not see engines."""

    ttft: Buckets
    tbt: Buckets
    e2e: Buckets
    queue: Buckets | None = None


@dataclass
class VllmSample:
    """What is true now, and counters since the start. `running` and `waiting` are requests by
    adapter, with the base model's under ""."""

    model_name: str
    running: Counter[str]
    waiting: Counter[str]
    kv_used: float
    """Part of the pages; 1 is all."""
    prompt_tokens: float
    generation_tokens: float
    finished: Mapping[str, int]
    """Answers by finish reason."""
    max_adapters: int
    """That may have running requests at the same time."""
    requests_running: int | None = None
    """Where the engine knows better than `running`."""
    requests_waiting: int | None = None
    preemptions: int | None = None


def vllm_families(sample: VllmSample, times: AnswerTimes) -> Iterator[Metric]:
    def gauge(name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", about, labels=[_LABEL])
        family.add_metric([sample.model_name], value)
        return family

    def counter(name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", about, labels=[_LABEL])
        family.add_metric([sample.model_name], value)
        return family

    running, waiting = sample.requests_running, sample.requests_waiting
    running = sum(sample.running.values()) if running is None else running
    waiting = sum(sample.waiting.values()) if waiting is None else waiting
    yield gauge("num_requests_running", "Requests that run.", running)
    yield gauge("num_requests_waiting", "Requests that wait.", waiting)
    yield gauge("kv_cache_usage_perc", "Of the pages, in use; 1 is all.", sample.kv_used)
    yield counter("prompt_tokens", "Of prompts.", sample.prompt_tokens)
    yield counter("generation_tokens", "Of answers.", sample.generation_tokens)
    if sample.preemptions is not None:
        about = "Requests that gave their pages up and are computed again."
        yield counter("num_preemptions", about, sample.preemptions)
    success = CounterMetricFamily(
        "vllm:request_success", "Answers that ended.", labels=[_LABEL, "finished_reason"]
    )
    for reason, count in sorted(list(sample.finished.items())):
        success.add_metric([sample.model_name, _REASONS.get(reason, reason)], count)
    yield success
    for name, buckets, about in (
        ("time_to_first_token", times.ttft, "From a request's arrival to its first token."),
        ("inter_token_latency", times.tbt, "Between two tokens of an answer."),
        ("time_per_output_token", times.tbt, "The same, by its older name."),
        ("e2e_request_latency", times.e2e, "From a request's arrival to its end."),
        ("request_queue_time", times.queue, "From a request's arrival to its first step."),
    ):
        if buckets is not None:
            labels = {_LABEL: sample.model_name}
            yield buckets.family(f"vllm:{name}_seconds", about, labels)
    yield lora_requests_info(sample.max_adapters, sample.running, sample.waiting)


def lora_requests_info(
    max_adapters: int, running: Counter[str], waiting: Counter[str]
) -> GaugeMetricFamily:
    """Adapters by what their requests do, as labels; the value is the time. One series, of a
    bounded length."""
    info = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters with requests that run, and with requests that wait; the value is the time.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    info.add_metric([str(max_adapters), _named(running), _named(waiting)], time.time())
    return info


def _named(requests: Counter[str]) -> str:
    # A copy: this may run in another thread than the one that counts.
    found = [(-count, name) for name, count in list(requests.items()) if name and count > 0]
    return ",".join(sorted(name for _, name in sorted(found)[:MAX_NAMED]))
