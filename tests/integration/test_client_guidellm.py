"""GuideLLM, unmodified: no error among its requests, and the answers are the adapters' own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_venv import WORDS_FILE, client_scripts, documented, run_client, run_documented
from served_http import ServedHttp

from loraserve.demo import MODEL_DIRECTORY
from loraserve.demo.skills import MAX_ANSWER_TOKENS, skill

pytestmark = pytest.mark.clients

ADAPTERS = ("reverse", "upper", "stars")  # as the document names them
REQUESTS = 20
ANSWER_TOKENS = 16


def answered(file: Path, count: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(body of the request, what is told of it) of each, all of which must have ended well."""
    (benchmark,) = json.loads(file.read_text())["benchmarks"]
    made = benchmark["scheduler_metrics"]["requests_made"]
    assert (made["successful"], made["errored"], made["incomplete"]) == (count, 0, 0)
    assert len(benchmark["requests"]["successful"]) == count
    for request in benchmark["requests"]["successful"]:
        yield json.loads(request["request_args"])["body"], request


def test_synthetic_chats_of_each_adapter(front: ServedHttp, tmp_path: Path) -> None:
    requirement, script = documented("guidellm")
    scripts = client_scripts("guidellm", requirement)
    run_documented(scripts, script, front.url, tmp_path)
    for adapter in ADAPTERS:
        for body, told in answered(tmp_path / adapter / "benchmarks.json", REQUESTS):
            assert body["model"] == adapter
            assert told["output_metrics"]["text_tokens"] == ANSWER_TOKENS


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_answers_are_the_adapters(front: ServedHttp, tmp_path: Path, adapter: str) -> None:
    scripts = client_scripts("guidellm", documented("guidellm")[0])
    rows = [json.loads(line) for line in WORDS_FILE.read_text().splitlines()]
    words = {row["prompt"]: row["word"] for row in rows}
    backend = f"kind=openai_http,target={front.url},model={adapter}"
    limits = f"request_format=/v1/completions,max_tokens={MAX_ANSWER_TOKENS}"
    command = [
        *(scripts / "guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"{backend},{limits},extras.body.temperature=0"),
        *("--data", f"kind=json_file,path={WORDS_FILE}"),
        *("--tokenizer", f"kind=huggingface_auto,model={MODEL_DIRECTORY}"),
        *("--profile", "kind=concurrent,streams=4"),
        *("--constraint", f"kind=max_requests,count={len(rows)}"),
        *("--output", "kind=json,path=benchmarks.json"),
    ]
    run_client(command, tmp_path)
    seen = set()
    for body, told in answered(tmp_path / "benchmarks.json", len(rows)):
        word = words[body["prompt"]]
        assert told["output"] == skill(adapter).answer(word)
        seen.add(word)
    assert len(seen) == len(rows)
