"""Conversions between element types, exact for every bit pattern."""

import numpy as np

from loraserve import _testing


def test_every_float16_is_read_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    found = np.array([_testing.f16_to_f32(int(h)) for h in halves], np.float32)
    assert np.array_equal(found, expected, equal_nan=True)


def test_bfloat16_rounds_to_the_nearest() -> None:
    # Ties go to the even neighbour; a NaN stays one.
    assert _testing.f32_to_bf16(1.00390625) == 0x3F80
    assert _testing.f32_to_bf16(1.01171875) == 0x3F82
    assert _testing.f32_to_bf16(float("nan")) & 0x7FFF > 0x7F80
