"""Draws against the distributions they claim, and the generator against its published vectors."""

from typing import Any

import numpy as np
import pytest
from backend_fixtures import BACKENDS, Array, FloatArray, close, open_backend

from loraserve import _testing

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5, 0.25], np.float32)
DRAWS = 20_000
EMULATED_DRAWS = 2_000  # of a device whose threads take turns
# One instruction set of the CPU will do: the sampler itself is compiled once for all.
DEVICES = [BACKENDS[0], *(one for one in BACKENDS if one[0] != "cpu")]
on_each_device = pytest.mark.parametrize(("device", "isa"), DEVICES)


def draws_on(device: str) -> int:
    return EMULATED_DRAWS if device.endswith("-emulated") else DRAWS


def sample_row(**options: Any) -> _testing.SampleRow:
    row = _testing.SampleRow()
    for name, value in options.items():
        setattr(row, name, value)
    return row


def tokens(device: str, logits: Array, draws: int, **options: Any) -> list[int]:
    """Tokens drawn from the same logits at positions 0, 1, ..."""
    rows = [sample_row(**{"seed": 7, "position": i, **options}) for i in range(draws)]
    table = np.broadcast_to(logits, (draws, len(logits)))
    return [token for token, _, _ in open_backend(device).sample(table, rows)]


def draw(device: str, logits: FloatArray = LOGITS, **options: Any) -> FloatArray:
    """The share of each token."""
    draws = draws_on(device)
    counts = np.bincount(tokens(device, logits, draws, **options), minlength=len(logits))
    return counts.astype(np.float32) / draws


def spread(device: str) -> float:
    """Five standard deviations of a binomial share."""
    return float(5 * 0.5 / draws_on(device) ** 0.5)


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


@on_each_device
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(device: str, isa: str, temperature: float) -> None:
    found = draw(device, temperature=temperature)
    np.testing.assert_allclose(found, softmax(LOGITS / temperature), atol=spread(device))


@on_each_device
def test_top_k(device: str, isa: str) -> None:
    expected = kept(softmax(LOGITS), [0, 6, 1])
    np.testing.assert_allclose(draw(device, top_k=3), expected, atol=spread(device))
    assert draw(device, top_k=1)[0] == 1.0


@on_each_device
def test_top_p_keeps_the_smallest_set_that_reaches_it(device: str, isa: str) -> None:
    p = softmax(LOGITS)
    order = np.argsort(-p)
    for top_p in (0.3, 0.6, 0.9):
        count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
        expected = kept(p, list(order[:count]))
        np.testing.assert_allclose(draw(device, top_p=top_p), expected, atol=spread(device))


@on_each_device
def test_min_p_is_relative_to_the_likeliest(device: str, isa: str) -> None:
    p = softmax(LOGITS)
    expected = kept(p, [i for i in range(len(p)) if p[i] >= 0.3 * p.max()])
    np.testing.assert_allclose(draw(device, min_p=0.3), expected, atol=spread(device))


@on_each_device
def test_greedy_takes_the_lowest_of_equals(device: str, isa: str) -> None:
    logits = np.array([0.0, 3.0, 3.0, 1.0], np.float32)
    assert draw(device, logits, temperature=0.0)[1] == 1.0


@on_each_device
def test_rows_of_nan_and_infinity_do_not_break_the_draw(device: str, isa: str) -> None:
    logits = np.array([np.nan, 1.0, -np.inf, np.nan], np.float32)
    assert draw(device, logits, top_k=2)[1] == 1.0
    assert draw(device, np.full(4, np.nan, np.float32)).sum() == 1.0


@on_each_device
def test_another_seed_draws_otherwise(device: str, isa: str) -> None:
    one, two, again = (tokens(device, LOGITS, 64, seed=seed) for seed in (1, 2, 1))
    assert one == again
    assert one != two


@on_each_device
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # LOGITS: token 0 has 2.0, token 6 has 1.5, token 1 has 1.0.
        ({}, 0),
        ({"output": [0], "presence_penalty": 0.4}, 0),
        ({"output": [0], "presence_penalty": 0.6}, 6),
        ({"output": [0], "frequency_penalty": 0.3}, 0),
        ({"output": [0, 0], "frequency_penalty": 0.3}, 6),
        ({"prompt": [0], "presence_penalty": 5.0, "frequency_penalty": 5.0}, 0),
        ({"prompt": [0], "repetition_penalty": 1.3}, 0),
        ({"prompt": [0], "repetition_penalty": 1.4}, 6),
        # Once, however often it was seen.
        ({"prompt": [0, 0], "output": [0], "repetition_penalty": 1.3}, 0),
        ({"logit_bias": [(5, 6.0)]}, 5),
        ({"banned": [0, 6]}, 1),
        ({"mask": [0b10110]}, 1),
        # A negative logit is multiplied: the penalty never makes a token likelier.
        ({"mask": [0b110000], "prompt": [4], "repetition_penalty": 2.0}, 4),
        ({"mask": [0b110000], "prompt": [4], "repetition_penalty": 3.5}, 5),
    ],
)
def test_penalties(device: str, isa: str, options: dict[str, Any], expected: int) -> None:
    assert tokens(device, LOGITS, 1, temperature=0.0, **options) == [expected]


@on_each_device
def test_logprobs_are_those_of_the_raw_logits(device: str, isa: str) -> None:
    """Whatever bias, mask and temperature did to the draw; also of a token that was not drawn."""
    backend = open_backend(device)
    rng = np.random.default_rng(8)
    table = np.stack([LOGITS, 10 * LOGITS, rng.standard_normal(8, dtype=np.float32), -LOGITS])
    asked: dict[str, Any] = {"want_logprob": True, "num_top_logprobs": 3}
    rows = [
        sample_row(temperature=0.0, **asked),
        sample_row(temperature=5.0, banned=[0], logit_bias=[(5, 50.0)], **asked),
        sample_row(temperature=0.0, mask=[1 << 3], **asked),
        sample_row(forced_token=2, want_logprob=True),
    ]
    shifted = table - table.max(-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted.astype(np.float64)).sum(-1, keepdims=True))
    results = backend.sample(table, rows)
    assert [token for token, _, _ in results] == [0, 5, 3, 2]
    for (token, logprob, top), row in zip(results, expected, strict=True):
        close(device, "logprob", np.float32([logprob]), row[[token]])
        best = np.argsort(-row)[: len(top)]
        assert [i for i, _ in top] == list(best)
        close(device, "logprob", np.float32([value for _, value in top]), row[best])
    assert [len(top) for _, _, top in results] == [3, 3, 3, 0]
