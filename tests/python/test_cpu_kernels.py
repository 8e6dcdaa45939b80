"""The CPU kernels of every instruction set this machine runs, against numpy in float64."""

import numpy as np
import numpy.typing as npt
import pytest
from loraserve import _testing

FloatArray = npt.NDArray[np.float32]
ISAS = _testing.kernel_names()


def random(rng: np.random.Generator, *shape: int) -> FloatArray:
    return rng.standard_normal(shape, dtype=np.float32)


def to_bfloat16(x: FloatArray) -> FloatArray:
    bits = np.array([_testing.f32_to_bf16(float(v)) for v in x.ravel()], np.uint32)
    return (bits << 16).view(np.float32).reshape(x.shape)


def test_conversions_match_numpy() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    found = np.array([_testing.f16_to_f32(int(h)) for h in halves], np.float32)
    assert np.array_equal(found, expected, equal_nan=True)
    # Ties go to the even neighbour; a NaN stays one.
    assert _testing.f32_to_bf16(1.00390625) == 0x3F80
    assert _testing.f32_to_bf16(1.01171875) == 0x3F82
    assert _testing.f32_to_bf16(float("nan")) & 0x7FFF > 0x7F80


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 16, 8), (1, 211, 96), (3, 80, 50), (7, 33, 200), (29, 130, 72)]
)
def test_gemm(isa: str, bfloat16: bool, rows: int, n: int, k: int) -> None:
    rng = np.random.default_rng(rows * n * k)
    x, w = random(rng, rows, k), random(rng, n, k)
    stored = to_bfloat16(w) if bfloat16 else w
    expected = x.astype(np.float64) @ stored.astype(np.float64).T
    found = _testing.gemm(isa=isa, x=x, w=w, bfloat16=bfloat16, threads=2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.sqrt(k))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_gemm_rows_do_not_depend_on_their_company(isa: str, bfloat16: bool) -> None:
    rng = np.random.default_rng(5)
    x, w = random(rng, 37, 160), random(rng, 100, 160)
    together = _testing.gemm(isa=isa, x=x, w=w, bfloat16=bfloat16, threads=2)
    for begin, end in [(0, 1), (1, 3), (3, 8), (8, 37), (36, 37)]:
        part = _testing.gemm(isa=isa, x=x[begin:end], w=w, bfloat16=bfloat16, threads=1)
        assert np.array_equal(part, together[begin:end])


RANKS = (1, 3, 8, 16, 17, 64, 100)


def lora_case(
    rng: np.random.Generator, k: int, n: int
) -> tuple[list[tuple[FloatArray, FloatArray, float]], list[tuple[int, int, int]]]:
    adapters = [(random(rng, r, k), random(rng, r, n), 0.2 + 1.0 / r) for r in RANKS]
    segments, row = [], 0
    for index, count in enumerate((1, 2, 5, 1, 9, 3, 4)):
        segments.append((row, count, index))
        row += count + (index == 2)  # one row of the base model in between
    return adapters, segments


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("page_bytes", [1024, 65536])
@pytest.mark.parametrize(("k", "n"), [(48, 80), (200, 37)])
def test_mixed_rank_lora(isa: str, bfloat16: bool, page_bytes: int, k: int, n: int) -> None:
    rng = np.random.default_rng(k + n)
    adapters, segments = lora_case(rng, k, n)
    x, y = random(rng, 26, k), random(rng, 26, n)
    expected = y.astype(np.float64)
    for begin, count, index in segments:
        a, b, scaling = adapters[index]
        if bfloat16:
            a, b = to_bfloat16(a), to_bfloat16(b)
        h = scaling * (x[begin : begin + count].astype(np.float64) @ a.T)
        expected[begin : begin + count] += h @ b
    found = _testing.lora(
        isa=isa, x=x, y=y, adapters=adapters, segments=segments, bfloat16=bfloat16,
        page_bytes=page_bytes, threads=2,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=5e-4)
    untouched = sorted(set(range(26)) - {r for s in segments for r in range(s[0], s[0] + s[1])})
    assert untouched
    assert np.array_equal(found[untouched], y[untouched])


@pytest.mark.parametrize("isa", ISAS)
def test_lora_rows_do_not_depend_on_their_company(isa: str) -> None:
    rng = np.random.default_rng(11)
    adapters, segments = lora_case(rng, 96, 64)
    x, y = random(rng, 26, 96), random(rng, 26, 64)

    def run(which: list[tuple[int, int, int]], page_bytes: int, threads: int) -> FloatArray:
        found: FloatArray = _testing.lora(
            isa=isa, x=x, y=y, adapters=adapters, segments=which, bfloat16=False,
            page_bytes=page_bytes, threads=threads,
        )  # fmt: skip
        return found

    together = run(segments, 4096, 2)
    for begin, count, index in segments:
        for row in range(begin, begin + count):
            alone = run([(row, 1, index)], 1024, 1)
            assert np.array_equal(alone[row], together[row])
