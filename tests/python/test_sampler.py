"""Draws against the distributions they claim, and the generator against its published vectors."""

import numpy as np
import numpy.typing as npt
import pytest
from loraserve import _testing

FloatArray = npt.NDArray[np.float32]
LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5, 0.25], np.float32)
DRAWS = 20_000


def draw(logits: FloatArray = LOGITS, **options: float) -> FloatArray:
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 7} | options
    tokens = _testing.sample_many(logits=logits, draws=DRAWS, **given)
    return np.bincount(tokens, minlength=len(logits)).astype(np.float32) / DRAWS


def softmax(logits: FloatArray) -> FloatArray:
    e = np.exp(logits - logits.max())
    return np.asarray(e / e.sum(), np.float32)


def kept(probabilities: FloatArray, keep: list[int]) -> FloatArray:
    out = np.zeros_like(probabilities)
    out[keep] = probabilities[keep]
    return out / out.sum()


# Known answers of the authors' Random123 distribution (kat_vectors, philox 4x32 10).
def test_philox_known_answers() -> None:
    assert _testing.philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    found = draw(temperature=temperature)
    # Five standard deviations of a binomial share.
    np.testing.assert_allclose(found, softmax(LOGITS / temperature), atol=5 * 0.5 / DRAWS**0.5)


def test_top_k() -> None:
    expected = kept(softmax(LOGITS), [0, 6, 1])
    np.testing.assert_allclose(draw(top_k=3), expected, atol=0.018)
    assert draw(top_k=1)[0] == 1.0


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    p = softmax(LOGITS)
    order = np.argsort(-p)
    for top_p in (0.3, 0.6, 0.9):
        count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
        expected = kept(p, list(order[:count]))
        np.testing.assert_allclose(draw(top_p=top_p), expected, atol=0.018)


def test_min_p_is_relative_to_the_likeliest() -> None:
    p = softmax(LOGITS)
    expected = kept(p, [i for i in range(len(p)) if p[i] >= 0.3 * p.max()])
    np.testing.assert_allclose(draw(min_p=0.3), expected, atol=0.018)


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([0.0, 3.0, 3.0, 1.0], np.float32)
    assert draw(logits, temperature=0.0)[1] == 1.0


def test_rows_of_nan_and_infinity_do_not_break_the_draw() -> None:
    logits = np.array([np.nan, 1.0, -np.inf, np.nan], np.float32)
    assert draw(logits, top_k=2)[1] == 1.0
    assert draw(np.full(4, np.nan, np.float32)).sum() == 1.0


def test_another_seed_draws_otherwise() -> None:
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "draws": 64}
    one, two, again = (
        _testing.sample_many(logits=LOGITS, seed=seed, **options) for seed in (1, 2, 1)
    )
    assert one == again
    assert one != two


def penalized(**options: object) -> int:
    given: dict[str, object] = {
        "prompt": [], "output": [], "repetition": 1.0, "presence": 0.0, "frequency": 0.0,
        "bias": [], "banned": [], "mask": [],
    }  # fmt: skip
    return int(_testing.sample_penalized(logits=LOGITS, **(given | options)))


def test_penalties() -> None:
    # LOGITS: token 0 has 2.0, token 6 has 1.5, token 1 has 1.0.
    assert penalized() == 0
    assert penalized(output=[0], presence=0.4) == 0
    assert penalized(output=[0], presence=0.6) == 6
    assert penalized(output=[0], frequency=0.3) == 0
    assert penalized(output=[0, 0], frequency=0.3) == 6
    assert penalized(prompt=[0], presence=5.0, frequency=5.0) == 0
    assert penalized(prompt=[0], repetition=1.3) == 0
    assert penalized(prompt=[0], repetition=1.4) == 6
    assert penalized(prompt=[0, 0], output=[0], repetition=1.3) == 0  # once, however often seen
    assert penalized(bias=[(5, 6.0)]) == 5
    assert penalized(banned=[0, 6]) == 1
    assert penalized(mask=[0b10110]) == 1
