"""Requests made from the OpenAPI document, right and wrong ones, against a real cluster: every
answer is as the document says, none is a fault of the server, each refusal names the field, and
afterwards nothing of them is left. 500 in `make test`, 10,000 in `make fuzz`."""

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from controller_fixtures import controller
from demo_node import serving_demo
from fake_node import until
from fuzz_budget import examples
from http_site import ask, gateway
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from loraserve.controller.admission import PackedCheck
from loraserve.controller.state import Settings
from loraserve.demo import MODEL_NAME, adapter_directory
from loraserve.gateway.access import ACCESS
from loraserve.gateway.openapi import OPERATIONS
from loraserve.gateway.server import GatewayServer
from loraserve.node.server import NodeServer

BOTH = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
QUICK = examples(1) == 1
# Of the cases that are drawn, those of each operation; the others have nothing to draw.
DRAWN = {
    "POST /v1/completions": 130,
    "POST /v1/chat/completions": 130,
    "POST /tokenize": 40,
    "POST /detokenize": 24,
    "POST /v1/load_lora_adapter": 36,
    "POST /v1/unload_lora_adapter": 24,
    "GET /v1/models/{model}": 26,
}
BODY_OF = {f"{method} {path}": one.body for (method, path), one in OPERATIONS.items() if one.body}
# Of some 1,500 cases at and beyond the limits of single fields, every so many-th.
STRIDE = 15 if QUICK else 1
# A busy machine does not make a lost node.
PATIENT = Settings(tick_seconds=0.05, silent_ticks=600)


@dataclass
class Site:
    """A controller, a node with the demo model and a gateway, with keys."""

    gateway: GatewayServer
    node: NodeServer
    headers: dict[str, str]


@contextlib.asynccontextmanager
async def site(path: Path) -> AsyncIterator[Site]:
    keys = path / "keys.jsonl"
    async with (
        controller(path, new_check=PackedCheck, settings=PATIENT) as heard,
        serving_demo(
            controller=heard.server.address,
            controller_key=heard.keys["node"],
            keys=keys,
            memory_bytes=4 << 20,
        ) as (node, _),
        gateway(
            controller=heard.server.address,
            key=heard.keys["node"],
            keys=keys,
            base=MODEL_NAME,
            adapter_roots=(adapter_directory("upper").parent,),
        ) as server,
    ):
        headers = {"authorization": f"Bearer {heard.keys['admin']}"}
        load = {"lora_name": "upper", "lora_path": "upper"}
        answer = await ask(server.address, "/v1/load_lora_adapter", load, headers=headers)
        assert answer.status == 200, answer
        # The stream to the node stays open from now on.
        first = {"model": "upper", "prompt": "abc=", "max_tokens": 2}
        answer = await ask(server.address, "/v1/completions", first, headers=headers)
        assert answer.status == 200, answer
        yield Site(server, node, headers)


def names_the_field(ctx: Any, response: Any, case: Any) -> None:
    """As are all that follow: a check of schemathesis. Fields of requests, or parts of HTTP."""
    if response.status_code >= 400 and case.path != "/ready":
        error = response.json()["error"]
        param = error["param"]
        assert error["message"].startswith(f"{param}: ")
        fields = {"body", "Content-Type", "Authorization", "method", "model"}
        if case.operation.body:
            schema = case.operation.schema.raw_schema["components"]["schemas"]
            fields |= set(schema[BODY_OF[case.operation.label]]["properties"])
        given = set(case.body) if isinstance(case.body, dict) else set()
        first = re.split(r"[.\[ ]", param)[0]
        assert first in fields or any(param in (name[:60], '""') for name in given), error


def no_fault(ctx: Any, response: Any, case: Any) -> None:
    assert response.status_code < 500, response.content


@dataclass
class Asker:
    """Asks the cases in a thread beside the cluster."""

    schema: Any
    url: str
    headers: dict[str, str]
    session: requests.Session
    asked: int = 0
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __call__(self, case: Any) -> None:
        response = case.call(
            base_url=self.url, session=self.session, headers=self.headers, timeout=60
        )
        self.asked += 1
        self.statuses[case.operation.label, response.status_code] += 1
        case.validate_response(response, checks=CHECKS)


def no_stream_fails(ctx: Any, response: Any, case: Any) -> None:
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        *_, last, end = response.content.decode().split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        assert b'data: {"error"' not in response.content


CHECKS = [
    no_fault,
    no_stream_fails,
    names_the_field,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


def lively(case: Any, choice: int) -> None:
    """A right request about models and adapters that are there, with short answers."""
    body = case.body
    if case.meta.generation.mode is not GenerationMode.POSITIVE or not isinstance(body, dict):
        return
    if choice and "model" in body:
        body["model"] = (MODEL_NAME, "upper", f"{MODEL_NAME}:upper")[choice % 3]
    if choice > 1 and ("messages" in body or "prompt" in body) and "model" in body:
        body["max_tokens"] = choice
        for name in ("max_completion_tokens", "min_tokens"):
            body.pop(name, None)
    if choice and "lora_name" in body:
        body["lora_name"] = "spare"
        body.pop("base_model_name", None)
        if "lora_path" in body:
            body["lora_path"] = ("stars", "upper")[choice % 2]


def coverage(asker: Asker, operation: Any) -> None:
    """Values at and beyond each limit, wrong types, missing fields, other methods, in turn."""
    made = asker.schema.iter_coverage_cases(
        operation, generation_modes=BOTH, generation_config=asker.schema.config.generation
    )
    for index, case in enumerate(made):
        if index % STRIDE == 0:
            lively(case, index // STRIDE % 8)
            asker(case)


def drawn(asker: Asker, operation: Any, mode: GenerationMode, count: int) -> None:
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=QUICK,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), st.integers(0, 7))
    def one(case: Any, choice: int) -> None:
        lively(case, choice)
        asker(case)

    one()


def ask_all(url: str, headers: dict[str, str]) -> Asker:
    """Runs in a thread beside the cluster's event loop."""
    with requests.Session() as session:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        schema.config.max_stream_events = 1_000_000  # streams are read to their end
        asker = Asker(schema, url, headers, session)
        for found in schema.get_all_operations():
            operation = found.ok()
            coverage(asker, operation)
            count = DRAWN.get(operation.label, 0) * (1 if QUICK else examples(3) // 2)
            for mode in BOTH if count else ():
                drawn(asker, operation, mode, count // 2)
    return asker


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
def test_every_answer_is_as_the_document_says_and_nothing_is_left(tmp_path: Path) -> None:
    async def test() -> None:
        async with site(tmp_path) as there:
            address = there.gateway.address
            tasks, pages = len(asyncio.all_tasks()), pages_of(there.node)
            asker = await asyncio.to_thread(ask_all, f"http://{address}", there.headers)
            print(asker.asked, "cases:", sorted(asker.statuses.items()))
            assert asker.asked >= (500 if QUICK else 10_000)
            # Of the document's own path schemathesis makes no case.
            labels = {f"{method} {path}" for method, path in ACCESS} - {"GET /openapi.json"}
            assert {label.replace("{model}", "") for label, _ in asker.statuses} == labels
            for label in DRAWN:  # not all of them were refused
                assert asker.statuses[label, 200] or label == "GET /v1/models/{model}"
            await nothing_is_left(there, tasks, pages)

    asyncio.run(asyncio.wait_for(test(), 900 if QUICK else 3600))


def pages_of(node: NodeServer) -> int:
    stats = node.node.engine.stats()
    return stats.pages_free + stats.pages_kv + stats.pages_adapter


async def nothing_is_left(there: Site, tasks: int, pages: int) -> None:
    """`tasks` and `pages`: before the requests."""
    node, metrics = there.node.node, there.gateway._site.metrics
    await until(lambda: not metrics.running and not metrics.waiting, "the gateway is at rest")
    await until(lambda: not len(node.requests), "the node is at rest")
    await until(lambda: len(asyncio.all_tasks()) <= tasks, "all tasks have ended")
    stats = node.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert pages_of(there.node) == pages
    assert {r.active_requests for r in node.adapters.residency()} <= {0}
    assert there.gateway._site.sessions._users == {}
    # What the prefix cache keeps it gives to whoever needs it: two whole contexts.
    whole = {"model": MODEL_NAME, "max_tokens": 50, "ignore_eos": True}
    bodies = [whole | {"prompt": [token] * 200} for token in (70, 71)]
    asked = [
        ask(there.gateway.address, "/v1/completions", b, headers=there.headers) for b in bodies
    ]
    for answer in await asyncio.gather(*asked):
        assert answer.status == 200
        assert answer.json["usage"]["completion_tokens"] == 50
    lines = (await ask(there.gateway.address, "/metrics", headers=there.headers)).body.decode()
    for name in ("running", "waiting"):
        assert f"vllm:num_requests_{name}" in lines
        assert re.search(rf"^loraserve_gateway_answers_{name} 0.0$", lines, re.M)
