"""The CUDA LoRA kernels where they could go wrong: many segments, long ones, empty ones, the edges
of tiles, splits and pages."""

import numpy as np
import pytest
from backend_fixtures import Array, FloatArray, close, from_bits, open_backend, random, to_bits

DEVICES = ["cuda-emulated", "cuda"]
pytestmark = pytest.mark.parametrize("device", DEVICES)

Adapter = list[tuple[int, int, Array, Array, float]]
Segments = list[tuple[int, int, int]]


def adapter(rng: np.random.Generator, ranks: dict[int, int], k: int, widths: list[int]) -> Adapter:
    """Modules of layer 0 with these ranks."""
    return [
        (0, m, to_bits(random(rng, rank, k)), to_bits(random(rng, rank, widths[m])), 0.5 / rank)
        for m, rank in ranks.items()
    ]


def expected_of(
    x: FloatArray, y: FloatArray, adapters: list[Adapter], segments: Segments, columns: list[int]
) -> Array:
    out = y.astype(np.float64)
    for begin, count, index in segments:
        for _, m, a, b, scaling in adapters[index] if index >= 0 else []:
            if m >= len(columns):
                continue
            h = scaling * (x[begin : begin + count].astype(np.float64) @ from_bits(a).T)
            first = columns[m]
            out[begin : begin + count, first : first + b.shape[1]] += h @ from_bits(b)
    return out


def check(
    device: str,
    adapters: list[Adapter],
    segments: Segments,
    rows: int,
    k: int,
    widths: list[int],
    page_bytes: int = 4096,
) -> None:
    """Against numpy; twice, to the same bits; what no adapter touches keeps its bits."""
    rng = np.random.default_rng(rows + k)
    gap = 5  # columns of nobody, at odd places
    columns = list(np.cumsum([gap, *(w + gap for w in widths[:-1])]))
    x, y = random(rng, rows, k), random(rng, rows, sum(widths) + gap * (len(widths) + 1))
    targets = [(0, m, int(column)) for m, column in enumerate(columns)]
    backend = open_backend(device)
    found = backend.lora(x, y, adapters, segments, targets, page_bytes)
    expected = expected_of(x, y, adapters, segments, columns)
    close(device, "lora", found, expected, np.sqrt(k) / 4)
    assert np.array_equal(found, backend.lora(x, y, adapters, segments, targets, page_bytes))
    assert np.array_equal(found[expected == y], y[expected == y])


def test_one_token_and_one_rank(device: str) -> None:
    rng = np.random.default_rng(1)
    check(device, [adapter(rng, {0: 1}, 8, [8])], [(0, 1, 0)], 1, 8, [8])


def test_more_segments_than_blocks(device: str) -> None:
    """70 adapters of a token each."""
    rng = np.random.default_rng(2)
    ranks = [int(r) for r in rng.integers(1, 20, 70)]
    adapters = [adapter(rng, {0: r, 1: 1 + r // 2}, 40, [24, 16]) for r in ranks]
    check(device, adapters, [(i, 1, i) for i in range(70)], 70, 40, [24, 16])


@pytest.mark.parametrize("count", [8, 9, 31, 32, 33, 70])
def test_runs_of_rows(device: str, count: int) -> None:
    """At and around the rows that a run has at most."""
    rng = np.random.default_rng(3)
    adapters = [adapter(rng, {0: 8}, 48, [40]), adapter(rng, {0: 17}, 48, [40])]
    segments = [(1, count, 0), (count + 1, 2, -1), (count + 3, 1, 1)]
    check(device, adapters, segments, count + 5, 48, [40])


@pytest.mark.parametrize("k", [255, 256, 264, 1024, 1032, 2304])
def test_splits_of_the_inputs(device: str, k: int) -> None:
    rng = np.random.default_rng(4)
    ranks = [8, 9, 24]
    adapters = [adapter(rng, {0: r}, k, [16]) for r in ranks]
    check(device, adapters, [(0, 1, 0), (1, 3, 1), (4, 2, 2)], 6, k, [16], 16384)


@pytest.mark.parametrize("width", [255, 256, 257, 1300])
def test_tiles_of_the_outputs(device: str, width: int) -> None:
    """Ranks for which an expand unit takes four column tiles, two and one."""
    rng = np.random.default_rng(5)
    adapters = [adapter(rng, {0: r, 1: r}, 32, [width, 8]) for r in (8, 16, 40)]
    check(device, adapters, [(0, 2, 0), (2, 1, 1), (3, 1, 2)], 5, 32, [width, 8], 8192)


def test_ranks_beyond_a_stage(device: str) -> None:
    """More ranks than are staged at a time, in short runs and long."""
    rng = np.random.default_rng(6)
    adapters = [adapter(rng, {0: r}, 24, [32]) for r in (128, 129, 512)]
    check(device, adapters, [(0, 1, 0), (1, 2, 1), (3, 1, 2)], 4, 24, [32])
    check(device, adapters, [(0, 35, 2)], 36, 24, [32])


def test_segments_without_work(device: str) -> None:
    rng = np.random.default_rng(7)
    adapters = [adapter(rng, {2: 4}, 16, [8, 8, 8]), adapter(rng, {0: 3}, 16, [8, 8, 8])]
    check(device, adapters, [], 3, 16, [8, 8, 8])
    check(device, adapters, [(0, 3, -1)], 3, 16, [8, 8, 8])
    # A module that no target asks for, and no rows at all.
    check(device, adapters, [(0, 1, 0), (1, 0, 1), (1, 1, 1)], 3, 16, [8, 8])


def test_a_bad_row_stays_alone(device: str) -> None:
    """NaN and infinity in a row come out in that row only."""
    rng = np.random.default_rng(8)
    adapters = [adapter(rng, {0: 8}, 16, [16])]
    x, y = random(rng, 4, 16), random(rng, 4, 16)
    segments = [(0, 4, 0)]
    clean = open_backend(device).lora(x, y, adapters, segments, [(0, 0, 0)], 4096)
    x[1, 3], x[2, 5] = np.nan, np.inf
    found = open_backend(device).lora(x, y, adapters, segments, [(0, 0, 0)], 4096)
    assert np.isnan(found[1]).all()
    assert not np.isfinite(found[2]).any()
    assert np.array_equal(found[[0, 3]], clean[[0, 3]])
