"""The requests of lm-eval's local-completions, and the scores that it makes of the answers: those
of transformers on the same checkpoint."""

import json
import urllib.request
from typing import Any

import pytest
import torch
from oracle.reference import Reference
from served_http import ServedHttp

from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME, adapter_directory
from loraserve.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# (context, continuation) as a task of lm-eval gives them; some right, some not.
PAIRS = [
    ("stressed=", "desserts"),
    ("garden=", "nedrag"),
    ("garden=", "garden"),
    ("a=", "b"),
    ("planet", "=xyz"),
]
TOLERANCE = 1e-3


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(MODEL_DIRECTORY)


@pytest.fixture(scope="module")
def oracle() -> Reference:
    made = Reference(MODEL_DIRECTORY)
    for name in ("reverse", "upper"):
        made.add_adapter(name, adapter_directory(name), check=False)
    return made


def right_scores(
    oracle: Reference, adapter: str | None, batch: list[list[int]], lengths: list[int]
) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy) of the last so many tokens of each."""
    found = []
    for ids, length in zip(batch, lengths, strict=True):
        rows = oracle.log_probs(ids, adapter)[-length - 1 : -1]
        wanted = torch.tensor(ids[-length:])
        score = rows.gather(1, wanted[:, None]).sum().item()
        found.append((score, bool((rows.argmax(-1) == wanted).all())))
    return found


def scores(answer: Any, contexts: list[int]) -> list[Any]:
    """As lm-eval reads them (lm_eval/models/openai_completions.py: parse_logprobs)."""
    found = []
    for choice, context in zip(
        sorted(answer["choices"], key=lambda c: c["index"]), contexts, strict=True
    ):
        logprobs = choice["logprobs"]
        tokens = logprobs["token_logprobs"][context:-1]
        tops = logprobs["top_logprobs"][context:-1]
        greedy = all(value == max(top.values()) for value, top in zip(tokens, tops, strict=True))
        found.append((sum(tokens), greedy))
    return found


@pytest.mark.parametrize("adapter", ["reverse", "upper", None])
def test_loglikelihood_is_that_of_transformers(
    front: ServedHttp, tokenizer: Tokenizer, oracle: Reference, adapter: str | None
) -> None:
    contexts = [tokenizer.encode(context) for context, _ in PAIRS]
    batch = [tokenizer.encode(context + rest) for context, rest in PAIRS]
    lengths = [len(whole) - len(c) for whole, c in zip(batch, contexts, strict=True)]
    body = {
        "model": adapter or MODEL_NAME,
        "prompt": batch,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = post(f"{front.url}/v1/completions", body)
    got = scores(answer, [len(context) for context in contexts])
    right = right_scores(oracle, adapter, batch, lengths)
    for (score, greedy), (wanted, wanted_greedy) in zip(got, right, strict=True):
        assert score == pytest.approx(wanted, abs=TOLERANCE)
        assert greedy == wanted_greedy


def test_generate_until(front: ServedHttp, tokenizer: Tokenizer) -> None:
    body = {
        "prompt": [tokenizer.encode("stressed="), tokenizer.encode("garden=")],
        "model": "reverse",
        "max_tokens": 16,
        "temperature": 0,
        "stop": ["\n\n", "r"],
        "seed": 1234,
    }
    answer = post(f"{front.url}/v1/completions", body)
    assert [choice["text"] for choice in answer["choices"]] == ["desse", "ned"]
    assert [choice["stop_reason"] for choice in answer["choices"]] == ["r", "r"]


def test_only_the_prompt_is_scored(front: ServedHttp) -> None:
    body = {"model": "upper", "prompt": "abc=", "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = post(f"{front.url}/v1/completions", body)
    (choice,) = answer["choices"]
    assert choice["text"] == "abc="
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["<bos>", "a", "b", "c", "="]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"][1:])
    assert answer["usage"]["completion_tokens"] == 0


def test_an_echo_is_the_beginning_of_the_text(front: ServedHttp) -> None:
    body = {"model": "upper", "prompt": "abc=", "echo": True, "temperature": 0, "logprobs": 1}
    answer = post(f"{front.url}/v1/completions", body)
    (choice,) = answer["choices"]
    assert choice["text"] == "abc=ABC"
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {9}
    assert "".join(logprobs["tokens"]) == "<bos>abc=ABC<eos>"
    request = urllib.request.Request(
        f"{front.url}/v1/completions",
        json.dumps(body | {"stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = [line[6:] for line in response.read().decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    told = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(piece["text"] for piece in told) == "abc=ABC"
    for name in logprobs:
        pieces = [value for piece in told for value in piece["logprobs"][name]]
        assert pieces == logprobs[name]
