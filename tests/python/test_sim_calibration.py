"""The simulator against 300 requests that vLLM served (data/llmservingsim).

What was fitted on what: the linear kernel terms on LLMServingSim's kernel tables; the engine's own
time per step and per sequence on the TPOT of the first 150 requests (tools/make_profiles.py). The
last 150 are the check: most of them waited for a free place, so that their TTFT sums up how fast
everything before them went.
"""

import gzip
import json
from pathlib import Path
from statistics import mean

import pytest

from loraserve.errors import InvalidArgumentError
from loraserve.placement.cost_model import StepLoad
from loraserve.profiles.files import load_profile
from loraserve.sim.recorded import read_recorded
from loraserve.sim.replay import mean_tpot_s, mean_ttft_s, replay

FITTED = 150


def errors(part: slice) -> tuple[float, float]:
    """Relative, of the means of TTFT and TPOT."""
    recorded = read_recorded()
    done = replay(load_profile("rtx-pro-6000-llama-3-8b-base"), [r.request for r in recorded])
    assert len(done) == len(recorded) == 300
    ttft = mean_ttft_s(done[part]) / mean(r.ttft_s for r in recorded[part]) - 1
    tpot = mean_tpot_s(done[part]) / mean(r.tpot_s for r in recorded[part]) - 1
    return ttft, tpot


@pytest.mark.parametrize("part", [slice(FITTED, None), slice(None)], ids=["held out", "all"])
def test_ttft_within_5_percent_and_tpot_within_3(part: slice) -> None:
    ttft, tpot = errors(part)
    assert abs(ttft) < 0.05
    assert abs(tpot) < 0.03


def test_rank_costs_what_toppings_reports() -> None:
    """28 % between rank mixes at the same batch size (Toppings, ATC'25): here a decode step of 32
    distinct adapters of rank 64 against rank 8, on a padded engine."""
    profile = load_profile("a100-llama-2-7b-padded")

    def step_s(rank: int) -> float:
        return profile.cost.seconds(
            StepLoad(
                decode_tokens=32,
                context_tokens=32 * 500,
                token_max_rank=32 * rank,
                adapters=32,
                adapter_bytes=32 * rank * profile.bytes_per_rank,
            )
        )

    assert step_s(64) / step_s(8) == pytest.approx(1.28, abs=0.05)


def test_a_broken_record_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl.gz"
    good = {
        "input_toks": 1,
        "output_toks": 2,
        "queued_ts": 0,
        "first_token_ts": 1,
        "last_token_ts": 2,
    }
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(good) + "\n" + json.dumps({**good, "output_toks": 1}) + "\n")
    with pytest.raises(InvalidArgumentError, match="line 2"):
        read_recorded(path)
