"""A node's /metrics against traffic that is known."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_node import BASE, FakeEngine, blob, serving, until
from node_calls import answers, generate, refused, run
from oracle.exposition import fetched

from loraserve.v1 import common_pb2


def ref(name: str) -> common_pb2.AdapterRef:
    return common_pb2.AdapterRef(name=name)


def test_counts_of_known_traffic_under_both_names() -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.queue_s = 0.3
        async with serving(engine, metrics_listen="127.0.0.1:0") as (server, channel):
            await answers(channel, "a")
            await answers(channel, "b", sampling={"max_tokens": 5})
            # One that goes on with an answer of another attempt, from its third token on.
            await answers(channel, "c", attempt=1, start_index=2, emitted_token_ids=[7, 8])
            seen = await asyncio.to_thread(fetched, server.metrics_address)
        generated = 3 + 5 + 1  # one of the last was left to draw
        for name, value in (
            ("loraserve_ttft_seconds_count", 3),
            ("loraserve_queue_wait_seconds_count", 3),
            ("loraserve_e2e_seconds_count", 3),
            ("loraserve_tbt_seconds_count", generated - 3),
            ("loraserve_resumed_requests_total", 1),
            ("loraserve_engine_preemptions_total", 0),
            ("vllm:generation_tokens_total", generated),
            ("vllm:prompt_tokens_total", 6),
            ("vllm:time_to_first_token_seconds_count", 3),
            ("vllm:inter_token_latency_seconds_count", generated - 3),
            ("vllm:time_per_output_token_seconds_count", generated - 3),
            ("vllm:request_queue_time_seconds_count", 3),
            ("vllm:num_requests_running", 0),
            ("vllm:num_requests_waiting", 0),
            ("vllm:num_preemptions_total", 0),
            ("vllm:kv_cache_usage_perc", 0.1),
            ("vllm:request_success_total", 3),
        ):
            assert seen.value(name) == pytest.approx(value), name
        assert seen.value("loraserve_queue_wait_seconds_sum") >= 0.9
        assert seen.labels("vllm:num_requests_running") == [{"model_name": BASE}]

    run(test)


def test_adapters_whose_requests_wait_and_run(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine(step_s=0.01)
        files = {}
        for name, letter in (("sql", "a"), ("legal", "b")):
            files[name] = tmp_path / f"{name}.lora"
            files[name].write_bytes(blob(letter))
        about = {"adapters": files, "metrics_listen": "127.0.0.1:0"}
        async with serving(engine, **about) as (server, channel):
            running = generate(channel, "r", adapter=ref("sql"), sampling={"max_tokens": 100})
            await running.read()
            engine.step_s = 3600.0  # no first token for those that come now
            for request_id, name in (("w", "legal"), ("base", "")):
                waiting = generate(channel, request_id, adapter=ref(name))
                reading.append(asyncio.ensure_future(waiting.read()))
            await until(lambda: len(engine.live) == 3, "the engine has all")
            seen = await asyncio.to_thread(fetched, server.metrics_address)
            for call in reading:
                call.cancel()
            running.cancel()
        (labels,) = seen.labels("vllm:lora_requests_info")
        assert labels == {
            "max_lora": "64",
            "running_lora_adapters": "sql",
            "waiting_lora_adapters": "legal",  # the base model is no adapter
        }
        assert seen.value("loraserve_adapter_lookups_total", result="hit") == 2
        assert seen.value("loraserve_adapter_tier_copies", tier="host") == 2

    reading: list[asyncio.Future[Any]] = []
    run(test)


def test_what_is_not_served_is_counted_by_its_code() -> None:
    async def test() -> None:
        async with serving(FakeEngine(), metrics_listen="127.0.0.1:0") as (server, channel):
            for request_id in ("", "x" * 999):
                await refused(answers(channel, request_id))
            seen = await asyncio.to_thread(fetched, server.metrics_address)
        assert seen.value("loraserve_requests_total", code="INVALID_ARGUMENT") == 2
        assert seen.value("loraserve_ttft_seconds_count") == 0

    run(test)
