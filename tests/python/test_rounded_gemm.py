"""Products of activations rounded to bfloat16, on every backend and with AVX512-BF16."""

import numpy as np
import pytest
from backend_fixtures import (
    BACKENDS,
    BATCH_INVARIANT,
    GEMM_SHAPES,
    close,
    from_bits,
    kept,
    kind,
    open_backend,
    precise,
    random,
    to_bits,
)

from loraserve import _testing

# The kernels of x86-64-v4 but for these products.
BF16 = "x86-64-v4-bf16"

pytestmark = pytest.mark.parametrize(("device", "isa"), [*BACKENDS, ("cpu", BF16)])


def open_rounding(device: str, isa: str, threads: int = 2) -> _testing.BackendOps:
    backend = open_backend(device, isa, threads=threads, activation_dtype="bfloat16")
    if isa == BF16 and not backend.name.startswith(f"cpu {BF16}"):
        pytest.skip("this machine has no AVX512-BF16")
    return backend


@pytest.mark.parametrize(("rows", "n", "k"), GEMM_SHAPES)
def test_values(device: str, isa: str, rows: int, n: int, k: int) -> None:
    """Both sides in bfloat16: the products are exact in float32, so only the sums differ."""
    backend = open_rounding(device, isa)
    rng = np.random.default_rng(rows * n * k + 1)
    x, w, y = precise(rng, rows, k), precise(rng, n, k), random(rng, rows, n)
    bias = precise(rng, n)
    product = from_bits(to_bits(x)).astype(np.float64) @ kept(w, "bfloat16").T
    scale = np.sqrt(k) if k < 512 else k / 4
    found = backend.gemm(x, [w], bias=list(bias), dtype="bfloat16")
    close(device, "gemm", found, product + bias, scale)
    close(device, "gemm", backend.gemm(x, [w], dtype="bfloat16", y=y), product + y, scale)
    if device in BATCH_INVARIANT:
        alone = open_rounding(device, isa, threads=1)
        for begin, end in {(0, 1), (rows - 1, rows), (rows // 3, rows)}:
            own = alone.gemm(x[begin:end], [w], bias=list(bias), dtype="bfloat16")
            assert np.array_equal(own, found[begin:end])


def test_float32_weights_see_activations_unrounded(device: str, isa: str) -> None:
    backend = open_rounding(device, isa)
    if kind(device) == "cuda":
        pytest.skip("cuda has bfloat16 alone")
    rng = np.random.default_rng(8)
    x, w = precise(rng, 3, 40), precise(rng, 20, 40)
    assert np.array_equal(backend.gemm(x, [w]), open_backend(device, isa).gemm(x, [w]))
