"""What the demo counts, and when it fails."""

import io
import itertools
import re
from pathlib import Path

import pytest
from rich.console import Console

from loraserve.demo.replay import Outcome
from loraserve.demo.skills import skill
from loraserve.demo.tally import percentile, tally
from loraserve.demo.view import summary
from loraserve.demo.workload import Arrival, arrivals, popularity


def outcome(
    name: str, right: bool = True, error: str | None = None, ttft_s: float = 0.1
) -> Outcome:
    arrival = Arrival(0.0, skill(name), "word")
    text = skill(name).answer("word") if right else "wrong"
    return Outcome(arrival, text, 4, ttft_s, [0.01, 0.02, 0.03], "node-1", 1, error)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(1, 101)]
    assert percentile(values, 0.5) == 50.0
    assert percentile(values, 0.95) == 95.0
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([], 0.5) is None


def test_rows_are_by_rank() -> None:
    outcomes = [outcome("upper"), outcome("stars", right=False), outcome("reverse", ttft_s=0.5)]
    result = tally(outcomes, 3, 2.0, 3, 2, {"b": ["y", "x"], "a": []}, {"ucx": 2})
    assert list(result.rows) == [4, 128]
    assert (result.rows[4].requests, result.rows[4].correct) == (2, 1)
    assert result.rows[128].ttft_p95_s == 0.5
    assert result.whole.tbt_p50_s == 0.02
    assert result.tokens_per_s == 6.0
    assert result.holders == {"a": (), "b": ("x", "y")}
    assert result.to_json()["peer_reads"] == {"ucx": 2}


@pytest.mark.parametrize(
    ("right", "wrong", "failed", "missing", "passed"),
    [
        (95, 5, 0, 0, True),
        (94, 6, 0, 0, False),
        (99, 0, 1, 0, False),
        (99, 0, 0, 1, False),
        (0, 0, 0, 0, False),
    ],
)
def test_it_passes_with_95_percent_right_and_none_lost(
    right: int, wrong: int, failed: int, missing: int, passed: bool
) -> None:
    outcomes = (
        [outcome("sort")] * right
        + [outcome("sort", right=False)] * wrong
        + [outcome("sort", error="node: is gone")] * failed
    )
    result = tally(outcomes, right + wrong + failed + missing, 1.0, 1, 1, {}, {})
    assert result.passed is passed
    assert result.lost == failed + missing
    assert result.errors == (("node: is gone",) if failed else ())


def test_arrivals_are_poisson_with_power_law_popularity() -> None:
    due = arrivals(200.0, 50.0, seed=3)
    assert due == arrivals(200.0, 50.0, seed=3)
    assert due != arrivals(200.0, 50.0, seed=4)
    assert abs(len(due) - 10_000) < 500  # five standard deviations
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.05)  # of an exponential distribution
    counts: dict[str, int] = {}
    for arrival in due:
        counts[arrival.skill.name] = counts.get(arrival.skill.name, 0) + 1
    for count, share in zip(
        sorted(counts.values(), reverse=True), popularity(10, 1.0), strict=True
    ):
        assert count / len(due) == pytest.approx(share, abs=0.02)


def test_a_burst_comes_at_once_in_the_middle() -> None:
    due = arrivals(10.0, 5.0, burst=40, seed=1)
    assert sum(arrival.at_s == 5.0 for arrival in due) == 40
    assert [a.at_s for a in due] == sorted(a.at_s for a in due)


def test_the_readme_shows_what_is_printed() -> None:
    outcomes = [outcome("upper"), outcome("reverse")]
    result = tally(outcomes, 2, 60.0, 100, 10, {"node-1": ["upper (rank 4, host)"]}, {"ucx": 3})
    printed = io.StringIO()
    Console(file=printed, width=110).print(summary(result, 110))
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = readme.partition("\nby rank; times in ms\n")[2].partition("\n```")[0]

    def columns(text: str) -> list[str]:
        head = next(line for line in text.splitlines() if line.startswith("┃"))
        return [word.strip() for word in head.split("┃")]

    def shape(line: str) -> str:
        return re.sub(r"\d+(\.\d+)?", "0", line.strip())

    *_, between, verdict = printed.getvalue().rstrip().splitlines()
    assert columns(shown) == columns(printed.getvalue())
    assert shape(shown.splitlines()[-1]) == shape(verdict)
    told = [shape(line) for line in re.findall("`(nodes read .*?)`", readme)]
    assert told == [shape(between)]
