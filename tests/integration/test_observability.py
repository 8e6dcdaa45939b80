"""What a whole served tree tells of itself: its metrics against known traffic and against their
documentation, and its log at debug level."""

import json
import re
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from oracle.exposition import Exposition, fetched
from served_http import ServedHttp, serving

DOCUMENT = Path(__file__).parents[2] / "docs/metrics.md"
# Daemons by the headings of the document.
HEADINGS = {
    "A node": {"node"},
    "The controller": {"controller"},
    "A gateway": {"gateway"},
    "On nodes and gateways": {"node", "gateway"},
    "On nodes alone": {"node"},
}
DAEMONS = ("controller", "node", "gateway")
MAX_TOKENS = 24
# In every prompt; what the adapters answer has it in capitals or backwards.
MARKER = "quixotry"
SECRETS = (MARKER, MARKER[::-1])
SERVED: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/chat/completions", "upper", {"messages": [{"role": "user", "content": MARKER}]}),
    ("/v1/completions", "reverse", {"prompt": MARKER, "stream": True}),
    ("/v1/completions", "upper", {"prompt": [MARKER, f"{MARKER} again"], "n": 2}),
]
REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/completions", "upper", {"prompt": {"text": MARKER}}),
    ("/v1/completions", "upper", {"prompt": MARKER * 2000}),
    ("/v1/completions", "upper", {"prompt": MARKER, "stop": [MARKER] * 99}),
    ("/v1/completions", "upper", {"prompt": MARKER, "logit_bias": {MARKER: 1}}),
    ("/v1/completions", "nobody-s", {"prompt": MARKER}),
    ("/v1/chat/completions", "upper", {"messages": [{"role": "user", "content": {"t": MARKER}}]}),
]
ANSWERS = 1 + 1 + 4


@dataclass
class Told:
    """What was seen while the tree served."""

    exposed: dict[str, Exposition] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def log(self, **wanted: Any) -> list[dict[str, Any]]:
        found = map(json.loads, self.lines)
        return [line for line in found if wanted.items() <= line.items()]


def post(served: ServedHttp, path: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(
        served.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read()).decode()


@pytest.fixture(scope="module")
def told() -> Told:
    told = Told()
    options = ("--log-format", "json", "--log-level", "debug")
    with serving("--demo", "--threads", "1", *options) as served:
        for path, model, body in SERVED:
            about = {"model": model, "max_tokens": MAX_TOKENS, "ignore_eos": True}
            told.answers.append(post(served, path, about | body))
        for path, model, body in REFUSED:
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(served, path, {"model": model} | body)
            assert 400 <= refused.value.code < 500, body
            refused.value.close()
        for name, address in re.findall(
            r'"loraserve\.(\w+)", "message": "metrics on http://(\S+)/metrics"', served.text
        ):
            told.exposed[name] = fetched(address)
    told.lines = served.lines
    return told


def documented(daemon: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels by name, of a daemon."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    heading = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        row = re.match(r"\| `([a-z0-9:_]+)` \| (\w+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", line)
        if row and daemon in HEADINGS[heading]:
            assert row[1] not in found, row[1]
            found[row[1]] = row[2], frozenset(re.findall(r"`(\w+)`", row[4]))
    return found


@pytest.mark.parametrize("daemon", DAEMONS)
def test_the_document_lists_what_is_exposed(told: Told, daemon: str) -> None:
    table = documented(daemon)
    families = told.exposed[daemon].families.values()
    exposed = {f.name + "_total" * (f.type == "counter"): f for f in families}
    assert sorted(exposed) == sorted(table)
    for name, family in exposed.items():
        kind, labels = table[name]
        assert family.type == kind, name
        assert family.documentation, name
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == labels, name


def test_known_traffic_is_counted_alike_on_both_sides(told: Told) -> None:
    node, gateway = told.exposed["node"], told.exposed["gateway"]
    tokens = ANSWERS * MAX_TOKENS
    for seen in (node, gateway):
        assert seen.value("vllm:generation_tokens_total") == tokens
        assert seen.value("vllm:request_success_total", finished_reason="length") == ANSWERS
        assert seen.value("vllm:time_to_first_token_seconds_count") == ANSWERS
        assert seen.value("vllm:e2e_request_latency_seconds_count") == ANSWERS
        assert seen.value("vllm:num_requests_running") == 0
        assert seen.value("vllm:num_requests_waiting") == 0
        assert 0 < seen.value("vllm:kv_cache_usage_perc") < 1
    assert node.value("vllm:prompt_tokens_total") == gateway.value("vllm:prompt_tokens_total") > 0
    assert node.value("loraserve_requests_total", code="OK") == ANSWERS
    assert node.value("loraserve_tbt_seconds_count") == tokens - ANSWERS
    assert node.value("loraserve_queue_wait_seconds_count") == ANSWERS
    assert node.value("loraserve_tokens_total", kind="generated") == tokens
    assert node.value("loraserve_engine_steps_total") > 0
    for path, count in Counter(path for path, _, _ in SERVED).items():
        ended = gateway.value("loraserve_gateway_requests_total", path=path, status="200")
        assert ended == count
    assert gateway.value("loraserve_gateway_adapters") == 10


def test_adapters_are_counted_by_tier_and_source(told: Told) -> None:
    node, controller = told.exposed["node"], told.exposed["controller"]
    assert node.value("loraserve_adapter_tier_copies", tier="host") == 10
    assert node.value("loraserve_adapter_lookups_total", result="hit") == ANSWERS
    assert node.value("loraserve_adapter_reads_total", source="store", outcome="fetched") == 10
    assert node.value("loraserve_adapter_read_bytes_total", source="store") > 0
    assert node.value("loraserve_adapter_load_seconds_count") == 10
    assert controller.value("loraserve_adapters") == 10
    assert controller.value("loraserve_commands_total", kind="load") == 10
    assert controller.value("loraserve_migrations_total") == 0
    assert controller.value("loraserve_nodes") == 1


def test_every_line_of_the_log_is_an_object_with_the_same_beginning(told: Told) -> None:
    assert told.lines
    for line in told.log():
        assert list(line)[:6] == ["ts", "level", "logger", "message", "service", "pid"]
        assert datetime.fromisoformat(line["ts"]).utcoffset() is not None
        assert line["level"] in ("debug", "info", "warning", "error")
    services = {line["service"] for line in told.log()}
    assert services == {"loraserve", "loraserve-controller", "loraserve-node", "loraserve-gateway"}


def test_a_request_is_one_line_at_the_gateway_and_one_for_each_attempt_at_the_node(
    told: Told,
) -> None:
    served = told.log(message="request ended", status=200)
    assert len(served) == len(SERVED)
    attempts = told.log(message="attempt ended", code="OK")
    assert len(attempts) == ANSWERS
    for line, (path, model, _) in zip(served, SERVED, strict=True):
        own = [a for a in attempts if a["request"].startswith(line["request"])]
        assert len(own) == (4 if model == "upper" and line is served[2] else 1)
        assert (line["path"], line["model"], line["adapter"]) == (path, model, model)
        assert (line["node"], line["attempt"], line["level"]) == ("node-1", 0, "info")
        assert line["completion_tokens"] == MAX_TOKENS * len(own)
        assert line["finish_reason"] == "length"
        for attempt in own:
            assert attempt["revision"] == line["revision"]
            assert (attempt["adapter"], attempt["node"]) == (model, "node-1")
            assert (attempt["attempt"], attempt["level"]) == (0, "debug")
            assert attempt["completion_tokens"] == MAX_TOKENS
            assert 0 < attempt["ttft_seconds"] <= attempt["seconds"]


def test_refused_requests_are_told_by_their_fields(told: Told) -> None:
    refused = [line for line in told.log(message="request ended") if line["status"] >= 400]
    assert len(refused) == len(REFUSED)
    assert all(line["error"] for line in refused)
    assert {line.get("error_field") for line in refused} >= {"prompt", "stop"}


def test_adapters_come_with_their_revisions(told: Told) -> None:
    here = [line for line in told.log(logger="loraserve.node.adapters") if "adapter" in line]
    assert {line["adapter"] for line in here} >= {"default/upper", "default/reverse"}
    assert all(len(line["revision"]) == 64 for line in here)


def test_no_prompt_and_no_answer_is_in_the_log(told: Told) -> None:
    assert MARKER.upper() in told.answers[0]  # or the log could not hold it
    text = "\n".join(told.lines).lower()
    for secret in SECRETS:
        assert secret not in text
