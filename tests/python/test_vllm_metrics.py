"""The series that vLLM's routers read, and that thousands of adapters make no more of them."""

from collections import Counter

from oracle.exposition import Exposition, parsed
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from loraserve.buckets import Buckets
from loraserve.vllm_metrics import MAX_NAMED, AnswerTimes, VllmSample, vllm_families


def exposed(running: Counter[str], waiting: Counter[str]) -> Exposition:
    times = AnswerTimes(*(Buckets((0.5, 1.0)) for _ in range(3)))
    times.ttft.observe(0.75)
    finished = {"length": 3, "cancelled": 2}
    sample = VllmSample("base", running, waiting, 0.25, 7, 9, finished, 64)

    class Families(Collector):
        def collect(self):  # type: ignore[no-untyped-def]
            return vllm_families(sample, times)

    registry = CollectorRegistry()
    registry.register(Families())
    return parsed(generate_latest(registry).decode())


def test_adapters_are_named_by_what_their_requests_do() -> None:
    seen = exposed(Counter({"sql": 2, "": 5, "gone": 0}), Counter({"legal": 1, "sql": 1}))
    assert seen.labels("vllm:lora_requests_info") == [
        {
            "max_lora": "64",
            "running_lora_adapters": "sql",
            "waiting_lora_adapters": "legal,sql",
        }
    ]
    assert seen.value("vllm:num_requests_running", model_name="base") == 7
    assert seen.value("vllm:num_requests_waiting", model_name="base") == 2
    assert seen.value("vllm:request_success_total", finished_reason="abort") == 2
    assert seen.value("vllm:time_to_first_token_seconds_bucket", le="0.5") == 0
    assert seen.value("vllm:time_to_first_token_seconds_bucket", le="1.0") == 1
    assert "vllm:request_queue_time_seconds" not in seen.families


def test_thousands_of_adapters_make_no_further_series_and_no_endless_label() -> None:
    def series(seen: Exposition) -> int:
        return sum(len(family.samples) for family in seen.families.values())

    many = Counter({f"adapter-{i:05}": 1 + (i % 1000 == 0) for i in range(5000)})
    seen = exposed(many, many)
    assert series(seen) == series(exposed(Counter(), Counter()))
    (labels,) = seen.labels("vllm:lora_requests_info")
    named = labels["running_lora_adapters"].split(",")
    assert len(named) == MAX_NAMED
    busiest = {name for name, count in many.items() if count == 2}
    assert busiest <= set(named)
