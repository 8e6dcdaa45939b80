"""Few requests, drawn to what is usual for their rank, against the truth behind them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.placement.shrinkage import shrunk

WINDOWS = 3


def drawn(rates: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and requests per window, and requests seen, of Poisson requests up to 1000 tokens."""
    rng = np.random.default_rng(seed)
    seen = rng.poisson(rates * WINDOWS).astype(float)
    tokens = np.array([rng.integers(1, 1001, int(n)).sum() for n in seen]) / WINDOWS
    return tokens, seen / WINDOWS, seen


def error(estimate: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(estimate - truth).sum() / truth.sum())


def test_adapters_that_are_alike_become_alike() -> None:
    truth = np.full(2000, 1.0)
    tokens, requests, seen = drawn(truth, 1)
    group = np.zeros(2000, np.int64)
    there = seen > 0
    estimate = tokens * shrunk(tokens, requests, seen, group)
    raw = error(tokens[there], truth[there] * 500.5)
    assert error(estimate[there], truth[there] * 500.5) < 0.4 * raw


def test_a_skewed_rank_keeps_its_skew() -> None:
    truth = 1000.0 / np.arange(1, 201)
    tokens, requests, seen = drawn(truth, 2)
    estimate = tokens * shrunk(tokens, requests, seen, np.zeros(200, np.int64))
    assert estimate[:20] == pytest.approx(tokens[:20], rel=0.02)
    assert error(estimate, truth * 500.5) <= error(tokens, truth * 500.5)


def test_ranks_do_not_mix() -> None:
    """A rank's adapters are drawn to their own mean."""
    truth = np.r_[np.full(500, 1.0), np.full(500, 20.0)]
    tokens, requests, seen = drawn(truth, 3)
    group = np.repeat([8, 64], 500)
    factor = shrunk(tokens, requests, seen, group)
    small, large = group == 8, group == 64
    alone = shrunk(tokens[small], requests[small], seen[small], group[small])
    assert factor[small] == pytest.approx(alone)
    for part in (small, large):
        assert (tokens * factor)[part].sum() == pytest.approx(tokens[part].sum(), rel=0.15)


def test_what_was_never_counted_stays() -> None:
    tokens = np.array([0.0, 5.0, 7.0])
    factor = shrunk(tokens, np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, 3.0]), np.zeros(3, int))
    assert factor[:2].tolist() == [1.0, 1.0]


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e12), st.floats(0, 1e6), st.floats(0, 1e6), st.sampled_from([8, 16, 128])
        ),
        max_size=30,
    )
)
def test_factors_are_numbers_over_zero(rows: list[tuple[float, float, float, int]]) -> None:
    columns = np.array(rows, float).reshape(-1, 4).T
    factor = shrunk(columns[0], columns[1], columns[2], columns[3].astype(np.int64))
    assert np.isfinite(factor).all()
    assert (factor >= 0).all()
