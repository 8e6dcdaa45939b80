"""lm-eval, unmodified: its scores over HTTP are those of transformers on the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from client_venv import client_scripts, documented, run_client, run_documented
from served_http import ServedHttp

from loraserve.demo import MODEL_DIRECTORY, adapter_directory

pytestmark = pytest.mark.long

TASKS = ("words_generate", "words_loglikelihood", "words_choice")
ADAPTER = "reverse"
WORDS = 24
TOLERANCE = 1e-3


def written(out: Path) -> tuple[Any, dict[str, Any]]:
    """(scores by task and metric, answers by task and document) as lm-eval writes them."""
    (results,) = out.rglob("results_*.json")
    samples = {}
    for task in TASKS:
        (path,) = out.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        samples[task] = {row["doc_id"]: row["filtered_resps"] for row in rows}
    return json.loads(results.read_text())["results"], samples


def test_scores_are_those_of_transformers(front: ServedHttp, tmp_path: Path) -> None:
    requirement, script = documented("lm_eval")
    scripts = client_scripts("lm_eval", requirement)
    run_documented(scripts, script, front.url, tmp_path)
    ours, our_answers = written(tmp_path / "results")
    model = f"pretrained={MODEL_DIRECTORY},peft={adapter_directory(ADAPTER)},dtype=float32"
    command = [
        *(scripts / "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", ",".join(TASKS)),
        *("--model_args", f"{model},add_bos_token=True,max_length=256", "--log_samples"),
        *("--include_path", "lm_eval_tasks", "--output_path", "right"),
    ]
    run_client(command, tmp_path)
    right, right_answers = written(tmp_path / "right")
    assert our_answers["words_generate"] == right_answers["words_generate"]
    for task in ("words_loglikelihood", "words_choice"):
        assert len(our_answers[task]) == WORDS
        for document, answers in our_answers[task].items():
            for (score, greedy), (wanted, wanted_greedy) in zip(
                answers, right_answers[task][document], strict=True
            ):
                assert float(score) == pytest.approx(float(wanted), abs=TOLERANCE)
                assert greedy == wanted_greedy
    for task in TASKS:
        metrics = {name: value for name, value in right[task].items() if isinstance(value, float)}
        assert metrics
        for name, value in metrics.items():
            assert ours[task][name] == pytest.approx(value, abs=TOLERANCE), (task, name)
    # The adapter answered, not its base: else both could be wrong alike.
    assert ours["words_generate"]["exact_match,none"] > 0.9
    assert ours["words_choice"]["acc,none"] > 0.9
