"""Requests that a real engine served, with the times it took: the simulator's oracle.

`data/llmservingsim` has 300 requests of vLLM 0.19.0 with Llama-3.1-8B in bfloat16 on one RTX PRO
6000, from LLMServingSim (MIT, see LICENSE there); at most 128 sequences and 2048 tokens a step.
"""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

from loraserve.errors import InvalidArgumentError
from loraserve.sim.sequence import BASE_ONLY, Request

RECORDED = (
    Path(__file__).parent / "data/llmservingsim/RTXPRO6000_Llama-3.1-8B_vllm_requests.jsonl.gz"
)


@dataclass(frozen=True)
class RecordedRequest:
    request: Request
    ttft_s: float
    """From the engine's queue to the first token."""
    tpot_s: float


def read_recorded(path: Path = RECORDED) -> list[RecordedRequest]:
    """In order of time, which begins at 0. Raises InvalidArgumentError, OSError."""
    rows = []
    with gzip.open(path, "rt") as lines:
        for number, line in enumerate(lines, 1):
            try:
                r = json.loads(line)
                begin, first, last = r["queued_ts"], r["first_token_ts"], r["last_token_ts"]
                tokens = r["output_toks"]
                request = Request(begin, BASE_ONLY, r["input_toks"], tokens)
                tpot_s = (last - first) / (tokens - 1)
            except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
                raise InvalidArgumentError(str(path), f"line {number}: {error!r}") from None
            rows.append(RecordedRequest(request, first - begin, tpot_s))
    rows.sort(key=lambda row: row.request.time_s)
    start = rows[0].request.time_s if rows else 0.0
    return [
        RecordedRequest(row.request._replace(time_s=row.request.time_s - start), *times)
        for row in rows
        for times in [(row.ttft_s, row.tpot_s)]
    ]
