"""A node with the real engine and the demo model: bad requests, deadlines, and what is freed."""

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from demo_node import serving_demo
from fake_node import until
from google.protobuf.duration_pb2 import Duration
from hypothesis import given, settings
from hypothesis import strategies as st
from node_calls import answers, generate, node_service, refused, run

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.durable_store import DurableStore
from loraserve.checkpoint.packed_adapter import pack, parse_packed
from loraserve.demo import MODEL_NAME
from loraserve.node.held import DEVICE, HOST
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.node.server import NodeServer
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.v1 import node_pb2
from loraserve.v1.inference_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_LENGTH,
    TokenIds,
)
from loraserve.wire_errors import from_rpc_error

UPPER = {"name": "upper"}
LONG = {"max_tokens": 250, "ignore_eos": True}
MAX_32 = 2**32 - 1

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"token_ids": TokenIds(ids=[259])}, "INVALID_ARGUMENT", "prompt"),
    ({"token_ids": TokenIds(ids=[MAX_32])}, "INVALID_ARGUMENT", "prompt"),
    ({"token_ids": TokenIds(ids=[1] * 256)}, "INVALID_ARGUMENT", "token_ids"),
    ({"token_ids": TokenIds()}, "INVALID_ARGUMENT", "token_ids"),
    ({"text": "x" * 256}, "INVALID_ARGUMENT", "prompt"),
    ({"text": "x" * 5000}, "INVALID_ARGUMENT", "prompt"),
    ({"text": ""}, "INVALID_ARGUMENT", "text"),
    ({"start_index": 1, "emitted_token_ids": [300]}, "INVALID_ARGUMENT", "prompt"),
    ({"sampling": {"max_tokens": 0}}, "INVALID_ARGUMENT", "max_tokens"),
    ({"sampling": {"temperature": -1.0}}, "INVALID_ARGUMENT", "temperature"),
    ({"sampling": {"top_p": 0.0}}, "INVALID_ARGUMENT", "top_p"),
    ({"sampling": {"min_p": 1.5}}, "INVALID_ARGUMENT", "min_p"),
    ({"sampling": {"repetition_penalty": 0.0}}, "INVALID_ARGUMENT", "repetition_penalty"),
    ({"sampling": {"logit_bias": {MAX_32: 1.0}}}, "INVALID_ARGUMENT", "logit_bias"),
    ({"sampling": {"logit_bias": {1: float("nan")}}}, "INVALID_ARGUMENT", "logit_bias"),
    ({"sampling": {"stop_token_ids": [259]}}, "INVALID_ARGUMENT", "stop_token_ids"),
    ({"sampling": {"logprobs": 1000}}, "INVALID_ARGUMENT", "logprobs"),
    ({"adapter": {"name": "nobody"}}, "NOT_FOUND", "adapter"),
    ({"adapter": {"name": "upper", "revision": "0" * 64}}, "NOT_FOUND", "adapter"),
    ({"adapter": {"base": "other"}}, "FAILED_PRECONDITION", "base"),
    ({"timeout": Duration(seconds=-5)}, "DEADLINE_EXCEEDED", "timeout"),
]


def at_rest(server: NodeServer) -> bool:
    stats = server.node.engine.stats()
    held = server.node.adapters.residency()
    return (
        not (stats.running or stats.waiting or len(server.node.requests))
        and not any(r.active_requests for r in held)
        and server.node.requests.queued_prefill_tokens == 0
    )


def test_bad_requests_name_their_field_and_harm_nobody() -> None:
    async def test() -> None:
        async with serving_demo("upper") as (server, channel):
            good = generate(channel, "good", adapter=UPPER, sampling=LONG)
            first = await good.read()
            for fields, code, field in BAD:
                error = await refused(answers(channel, "bad", **dict(fields)))
                assert (error.code, error.field) == (code, field), fields
            for _ in range(249):
                last = await good.read()
                if last.finish_reason:
                    break
            assert first.start.revision
            assert (last.finish_reason, last.usage.completion_tokens) == (FINISH_REASON_LENGTH, 250)
            await until(lambda: at_rest(server), "at rest")

    run(test)


def test_a_prompt_that_memory_can_never_hold_is_refused_for_good() -> None:
    async def test() -> None:
        async with serving_demo(memory_bytes=1 << 19) as (_, channel):
            ids = TokenIds(ids=[1] * 250)
            error: Any = await refused(answers(channel, token_ids=ids))
            assert (error.code, error.field) == ("RESOURCE_EXHAUSTED", "prompt")
            assert error.retry_after_s is None
            assert await answers(channel)

    run(test)


def test_an_adapter_that_does_not_fit_the_model_is_refused_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((3, 16), dtype=np.float32)
    b = rng.standard_normal((24, 3), dtype=np.float32)
    blob = pack(AdapterSource("x", (AdapterModule(0, "q_proj", 3, 2.0, "F32", a, b),)))
    (tmp_path / "blob").write_bytes(blob)
    revision = parse_packed(blob).revision
    DurableStore(str(tmp_path / "store")).put(revision, tmp_path / "blob")

    async def test() -> None:
        async with serving_demo("upper", store=tmp_path / "store") as (server, channel):
            adapter = AdapterId("default", MODEL_NAME, "odd")
            spec = AdapterSpec(adapter, revision, len(blob), 3)
            held = server.node.adapters.begin_load(AdapterLoadInfo(spec), placed=True)
            await held.settled.wait()
            error = await refused(answers(channel, adapter={"name": "odd"}))
            assert (error.code, error.field) == ("FAILED_PRECONDITION", "adapter")
            assert "q_proj" in error.message
            assert await answers(channel, adapter=UPPER)

    run(test)


def test_a_request_expires_while_it_waits_for_the_engine() -> None:
    async def test() -> None:
        async with serving_demo(max_sequences=1) as (server, channel):
            running = [generate(channel, f"r{i}", sampling=LONG) for i in range(150)]
            await running[0].read()
            short = {"timeout": Duration(nanos=30_000_000)}
            error = await refused(answers(channel, "late", **short))
            assert error.code == "DEADLINE_EXCEEDED"
            assert server.node.engine.stats().waiting  # those before it wait still
            error = await refused(answers(channel, "later", rpc_timeout=0.03))
            assert error.code == "DEADLINE_EXCEEDED"
            for call in running:
                call.cancel()
            await until(lambda: at_rest(server), "at rest")

    run(test)


def test_what_is_cancelled_gives_back_pages_and_pins() -> None:
    async def test() -> None:
        # Room for two long answers at once and not for more.
        async with serving_demo("upper", "rot13", memory_bytes=3 << 20) as (server, channel):
            free = server.node.engine.stats().pages_free
            for turn in range(10):
                calls = [
                    generate(channel, f"r{turn}-{i}", sampling=LONG, adapter={"name": name})
                    for i, name in enumerate(("upper", "rot13", ""))
                ]
                await asyncio.gather(*(call.read() for call in calls[:2]))
                match turn % 3:
                    case 0:
                        for call in calls:
                            call.cancel()
                    case 1:
                        for i in range(3):
                            abort = node_pb2.AbortRequest(request_id=f"r{turn}-{i}")
                            await node_service(channel).Abort(abort)
                    case 2:  # a later attempt of each takes its place, then goes too
                        later = [
                            generate(channel, f"r{turn}-{i}", attempt=1, sampling=LONG)
                            for i in range(3)
                        ]
                        await later[0].read()
                        for call in later:
                            call.cancel()
                await until(lambda: at_rest(server), "at rest")
            left = server.node.adapters.residency()
            assert {r.state for r in left} <= {HOST, DEVICE}
            assert {r.active_requests for r in left} == {0}
            # Only the prefix cache may keep pages, and gives them to whoever needs them.
            whole = TokenIds(ids=[7] * 200)
            out = await answers(channel, "whole", token_ids=whole, sampling={"max_tokens": 50})
            assert out[-1].usage.completion_tokens <= 50
            assert server.node.engine.stats().pages_free <= free

    run(test)


def test_an_answer_with_a_minimum_goes_on_from_every_cut() -> None:
    """As a client does whose node is lost: the same parameters, and what it has."""

    async def test() -> None:
        async with serving_demo("upper") as (server, channel):
            tokenizer = server.node.engine.tokenizer
            for minimum in (6, 9, 12):
                sampling: dict[str, Any] = {
                    "max_tokens": 12,
                    "min_tokens": minimum,
                    "temperature": 1.0,
                    "seed": 5,
                    "logit_bias": {tokenizer.eos_ids[0]: 1000.0},
                }
                call: dict[str, Any] = {"adapter": UPPER, "text": "stone=", "sampling": sampling}
                out = await answers(channel, **call)
                whole = [token for message in out for token in message.token_ids]
                assert len(whole) == min(minimum + 1, 12)
                for cut in range(1, len(whole)):
                    resumed = {"start_index": cut, "emitted_token_ids": whole[:cut], "attempt": 1}
                    rest = await answers(channel, **call, **resumed)
                    assert [t for message in rest for t in message.token_ids] == whole[cut:]
                    assert rest[-1].finish_reason == out[-1].finish_reason

    run(test)


def test_an_abort_ends_an_answer_with_what_it_has() -> None:
    async def test() -> None:
        async with serving_demo("upper") as (server, channel):
            call = generate(channel, adapter=UPPER, sampling=LONG)
            tokens = len((await call.read()).token_ids)
            await node_service(channel).Abort(node_pb2.AbortRequest(request_id="r"))
            while not (message := await call.read()).finish_reason:
                tokens += len(message.token_ids)
            assert message.finish_reason in (FINISH_REASON_CANCELLED, FINISH_REASON_LENGTH)
            assert message.usage.completion_tokens == tokens + len(message.token_ids)
            await until(lambda: at_rest(server), "at rest")

    run(test)


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-30, 1e30, float("inf"), float("nan")])
COUNTS = st.sampled_from([0, 1, 2, 3, 64, 65, 255, 256, 2**31 - 1, 2**31, MAX_32])
SAMPLING = st.fixed_dictionaries(
    {"max_tokens": st.sampled_from([0, 1, 2, 3, 2**31, MAX_32])},
    optional={
        "min_tokens": COUNTS,
        "temperature": NUMBERS,
        "top_k": COUNTS,
        "top_p": NUMBERS,
        "min_p": NUMBERS,
        "repetition_penalty": NUMBERS,
        "presence_penalty": NUMBERS,
        "frequency_penalty": NUMBERS,
        "logit_bias": st.dictionaries(COUNTS, NUMBERS, max_size=2),
        "seed": st.sampled_from([0, 2**63, 2**64 - 1]),
        "stop": st.lists(st.text(max_size=3), max_size=2),
        "stop_token_ids": st.lists(COUNTS, max_size=2),
        "ignore_eos": st.booleans(),
        "logprobs": COUNTS,
    },
)
REQUEST = st.fixed_dictionaries(
    {"sampling": SAMPLING},
    optional={
        "attempt": COUNTS,
        "emitted_token_ids": st.lists(COUNTS, max_size=2),
        "start_index": st.integers(0, 2),
        "timeout": st.builds(Duration, seconds=st.sampled_from([-(2**40), 0, 1, 2**40])),
        "adapter": st.fixed_dictionaries(
            {}, optional={"base": st.text(max_size=3), "name": st.sampled_from(["upper", "", "é"])}
        ),
        "priority": st.sampled_from([-(2**31), 0, 2**31 - 1]),
    },
)
PROMPT = st.one_of(
    st.builds(lambda text: {"text": text}, st.text(max_size=20)),
    st.builds(lambda ids: {"token_ids": TokenIds(ids=ids)}, st.lists(COUNTS, max_size=3)),
)
TYPED = {
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "NOT_FOUND",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
}


def test_no_request_whatever_is_an_internal_error() -> None:
    """One node for all of them: what one leaves behind would hit the next."""
    loop = asyncio.new_event_loop()
    serving = serving_demo("upper")
    server, channel = loop.run_until_complete(serving.__aenter__())

    @settings(max_examples=150, deadline=None)
    @given(REQUEST, PROMPT, st.text(min_size=1, max_size=5))
    def ask(fields: dict[str, Any], prompt: dict[str, Any], request_id: str) -> None:
        async def test() -> None:
            try:
                call = generate(channel, request_id, **fields, **prompt)
                messages = [m async for m in call]
                code = "OK" if messages[-1].finish_reason else "no end"
            except grpc.aio.AioRpcError as error:
                code = from_rpc_error(error).code
            assert code in {"OK", *TYPED}
            await until(lambda: at_rest(server), "at rest")

        loop.run_until_complete(test())

    try:
        ask()
    finally:
        loop.run_until_complete(serving.__aexit__(None, None, None))
        loop.close()
