"""Generators and readers: what is asked for is what comes, from a seed, and errors say where."""

import builtins
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraserve.errors import FailedPreconditionError, InvalidArgumentError
from loraserve.sim.servegen import read_lengths, read_rates, servegen
from loraserve.sim.suite import (
    SUITE,
    WORKLOADS,
    WorkloadOptions,
    flash_window,
    make_workload,
    trace_workload,
)
from loraserve.sim.traces import (
    AZURE_CODE,
    AZURE_CONV,
    MalformedTraceError,
    read_azure,
    read_mooncake,
    read_trace,
)
from loraserve.sim.workload import RANKS, Workload, gamma_arrivals, power_indices, zipf_shares


def made(name: str, **changes: Any) -> Workload:
    options = {"adapters": 100, "rate": 50.0, "duration_s": 400.0, "seed": 3, **changes}
    return make_workload(name, WorkloadOptions(**options))


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_workload_is_drawn_from_its_seed(name: str) -> None:
    one, same, other = made(name), made(name), made(name, seed=4)
    for column in ("time_s", "adapter", "prompt_tokens", "output_tokens"):
        assert np.array_equal(getattr(one, column), getattr(same, column))
    assert one.ranks == same.ranks
    assert not np.array_equal(one.time_s, other.time_s)
    assert len(one) == pytest.approx(50 * 400, rel=0.25)
    assert one.time_s.min() >= 0
    assert one.time_s.max() < 400
    assert one.adapter.min() >= 0
    assert one.adapter.max() < len(one.ranks) == 100
    assert one.prompt_tokens.min() >= 1
    assert one.output_tokens.min() >= 1


def share_of_rank(w: Workload, rank: int, begin: float = 0, end: float = 1) -> float:
    part = (w.time_s >= begin * w.duration_s) & (w.time_s < end * w.duration_s)
    return float((np.array(w.ranks)[w.adapter[part]] == rank).mean())


def test_uniform_and_zipf_popularity() -> None:
    counts = np.sort(np.bincount(made("uniform").adapter, minlength=100))[::-1]
    assert counts[0] < 2 * counts[-1]
    assert np.bincount(made("uniform").ranks)[list(RANKS)].tolist() == [20] * 5
    counts = np.sort(np.bincount(made("zipf").adapter, minlength=100))[::-1]
    assert counts[0] / counts.sum() == pytest.approx(zipf_shares(100, 1)[0], rel=0.1)
    assert np.bincount(made("zipf").ranks)[list(RANKS)].tolist() == [30, 25, 20, 15, 10]


def test_hot_adapters_are_of_one_rank() -> None:
    assert share_of_rank(made("hot_large"), 128) > 0.5
    assert share_of_rank(made("hot_small"), 8) > 0.7


def test_drift_turns_the_shares_round() -> None:
    drift, step = made("drift"), made("drift_step")
    assert share_of_rank(drift, 8, 0, 0.1) > 0.5
    assert share_of_rank(drift, 128, 0.9, 1) > 0.5
    assert share_of_rank(drift, 8, 0.4, 0.6) == pytest.approx(0.32, abs=0.05)
    assert share_of_rank(step, 8, 0.4, 0.5) == pytest.approx(0.6, abs=0.05)
    assert share_of_rank(step, 128, 0.5, 0.6) == pytest.approx(0.6, abs=0.05)


def test_flash_crowd_asks_for_one_cold_adapter() -> None:
    w = made("flash")
    begin, end = flash_window(w.duration_s)
    inside = (w.time_s >= begin) & (w.time_s < end)
    cold = 50
    before = (w.adapter[~inside] == cold).sum() / (w.duration_s - (end - begin))
    during = (w.adapter[inside] == cold).sum() / (end - begin)
    assert 25 < during / before < 100


def test_burstiness() -> None:
    rng = np.random.default_rng(0)
    for cv in (1.0, 4.0):
        gaps = np.diff(gamma_arrivals(rng, 100.0, 400.0, cv))
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
        assert 1 / gaps.mean() == pytest.approx(100, rel=0.1)


def test_s_loras_alpha_is_a_trap() -> None:
    """The shares of the first of 200 adapters that are documented."""
    for alpha, share in ((1.0, 0.005), (0.6, 0.042), (0.3, 0.204), (0.1, 0.589)):
        drawn = power_indices(np.random.default_rng(0), 200, alpha, 100_000)
        assert (drawn == 0).mean() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("short", sorted(SUITE))
def test_the_suite_has_short_names(short: str) -> None:
    w = made(short.lower(), adapters=20, duration_s=60.0)
    assert w.name == SUITE[short]


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("nonsense", {}, "workload"),
        ("zipf", {"rate": 0.0}, "rate"),
        ("zipf", {"rate": float("nan")}, "rate"),
        ("zipf", {"cv": -1.0}, "cv"),
        ("zipf", {"duration_s": 0.0}, "duration"),
        ("zipf", {"adapters": 0}, "adapters"),
        ("zipf", {"lengths": "nonsense"}, "lengths"),
        ("drift", {"adapters": 2}, "adapters"),
        ("slora", {"alpha": 0.0}, "alpha"),
    ],
)
def test_bad_options_are_named(name: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        made(name, **changes)
    assert error.value.field == field


# Traces


def test_azure_as_published() -> None:
    conv, code = read_azure(AZURE_CONV), read_azure(AZURE_CODE)
    assert (len(conv.time_s), len(code.time_s)) == (19366, 8819)
    assert conv.time_s[0] == 0
    assert conv.time_s[1] == pytest.approx(4.314579, abs=1e-6)
    assert (conv.prompt_tokens[0], conv.output_tokens[0]) == (374, 44)
    assert conv.prompt_tokens.mean() == pytest.approx(1155, abs=1)
    assert code.output_tokens.mean() == pytest.approx(28, abs=1)


def write_mooncake(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_mooncake(tmp_path: Path) -> None:
    row = {"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
    path = write_mooncake(tmp_path / "t.jsonl", row, "", {**row, "timestamp": 0})
    trace = read_trace(path)
    assert trace.time_s.tolist() == [0.0, 3.0]  # in order of time, whatever the file's
    assert trace.prompt_tokens.tolist() == [6758, 6758]
    w = trace_workload("t", trace, adapters=10, seed=1, rate=4.0)
    assert w.time_s.tolist() == [0.0, 0.5]


GOOD = {"timestamp": 1, "input_length": 2, "output_length": 3}


@pytest.mark.parametrize(
    ("line", "column"),
    [
        ('{"timestamp": 1,', 17),
        ({"timestamp": 1, "input_length": 2}, 1),
        ({**GOOD, "input_length": "x"}, 18),
        ({**GOOD, "output_length": -1}, 37),
        ({**GOOD, "timestamp": True}, 2),
        ('{"timestamp": NaN, "input_length": 2, "output_length": 3}', 2),
        ('{"timestamp": 1, "input_length": 1e400, "output_length": 3}', 18),
        ("[1, 2, 3]", 1),
    ],
)
def test_a_malformed_mooncake_line(tmp_path: Path, line: object, column: int) -> None:
    path = write_mooncake(tmp_path / "t.jsonl", GOOD, line)
    with pytest.raises(MalformedTraceError) as error:
        read_mooncake(path)
    assert (error.value.line, error.value.column) == (2, column)
    assert f"{path}, line 2, column {column}" in str(error.value)


@pytest.mark.parametrize(
    ("line", "column"),
    [
        ("2023-11-16 18:15:46.6805900,374", 1),
        ("yesterday,374,44", 1),
        ("2023-11-16 18:15:46.68x,374,44", 1),
        ("2023-11-16 18:15:46.6805900,many,44", 29),
        ("2023-11-16 18:15:46.6805900,374,-4", 33),
    ],
)
def test_a_malformed_azure_line(tmp_path: Path, line: str, column: int) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,1\n" + line + "\n"
    )
    with pytest.raises(MalformedTraceError) as error:
        read_azure(path)
    assert (error.value.line, error.value.column) == (3, column)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    header = tmp_path / "h.csv"
    header.write_text("time,a,b\n")
    empty = tmp_path / "e.jsonl"
    empty.write_text("")
    broken = tmp_path / "b.csv.gz"
    broken.write_bytes(gzip.compress(AZURE_CONV.read_bytes())[:2000])
    binary = tmp_path / "x.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (header, empty, broken, binary, tmp_path / "none.csv", tmp_path / "t.txt"):
        with pytest.raises(InvalidArgumentError, match="trace"):
            read_trace(path)


# ServeGen


def test_servegen_keeps_skew_and_drift() -> None:
    rates = read_rates()
    shares = rates.share.sum(axis=1) / rates.share.sum()
    top = np.sort(shares)[::-1]
    assert 0.1 < top[0] < 0.3
    assert top[: len(top) // 10].sum() > 0.6
    hourly = rates.share[:, :144].reshape(len(shares), 24, 6).sum(axis=2)
    hourly = hourly / hourly.sum(axis=0)
    moved = np.abs(np.diff(hourly, axis=1)).sum(axis=0) / 2
    assert 0.08 < np.median(moved) < 0.4
    assert set(read_lengths()) <= {
        (m, c) for m in ("m-small", "m-mid", "m-large") for c in range(999)
    }


def test_servegen_workload() -> None:
    w = servegen(rate=30.0, duration_s=1200.0, seed=1, adapters=50)
    assert len(w) == pytest.approx(36_000, rel=0.2)
    assert len(set(w.adapter.tolist())) <= 50 == len(w.ranks)
    more = servegen(rate=5.0, duration_s=600.0, seed=1, adapters=400)
    assert len(more.ranks) == 400


def test_servegen_needs_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FailedPreconditionError, match="pyarrow"):
        servegen(1.0, 10.0, 0)


def test_parquet_files_that_are_not_servegens(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = tmp_path / "text.parquet"
    text.write_text("no")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"model": ["m-small"], "client": [1]}), other)
    wrong = tmp_path / "wrong.parquet"
    columns = {"model": ["m-small"] * 2, "client": [1, 2], "t_s": [0, 600]}
    columns |= {"rate_rps": [1.0, float("nan")], "pattern": ["Gamma"] * 2, "arg1": [1.0, 1.0]}
    pq.write_table(pa.table(columns), wrong)
    for path in (text, other, tmp_path / "none.parquet"):
        with pytest.raises(InvalidArgumentError, match="trace"):
            read_rates(path)
    with pytest.raises(MalformedTraceError, match="line 2, column 4"):
        read_rates(wrong)
