"""The backends that one suite of tests runs on, and what each may be off by."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from loraserve import _testing

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

BACKENDS = [
    *(("cpu", isa) for isa in _testing.kernel_names()),
    ("cuda-emulated", ""),  # the sources of "cuda" on the CPU: test builds without CUDA have it
    ("cuda", ""),
]
BATCH_INVARIANT = ("cpu",)
"""Backends whose rows are bitwise the same whatever they are computed with."""

# Of one element of the result, by device and operation: (relative to it, absolute). The inputs are
# of order 1. The CPU computes in float32; CUDA keeps activations, and so each result, in bfloat16.
TOLERANCE = {
    ("cpu", "gemm"): (0.0, 2e-6),  # times the root of the length of the sum
    ("cpu", "rms_norm"): (2e-6, 1e-6),
    ("cpu", "attention"): (0.0, 2e-5),
    ("cpu", "silu_mul"): (2e-6, 1e-6),
    ("cpu", "lora"): (2e-5, 5e-4),
    ("cpu", "logprob"): (0.0, 5e-6),
    ("cuda", "gemm"): (8e-3, 4e-3),
    ("cuda", "rms_norm"): (8e-3, 4e-3),
    ("cuda", "attention"): (8e-3, 1e-2),
    ("cuda", "silu_mul"): (8e-3, 4e-3),
    ("cuda", "lora"): (8e-3, 2e-2),
    ("cuda", "logprob"): (0.0, 2e-2),
}


GEMM_SHAPES = [
    *[(1, 16, 8), (1, 211, 96), (3, 80, 50), (7, 33, 200), (29, 130, 72), (130, 48, 33)],
    *[(1, 70, 1501), (11, 40, 1025), (101, 17, 2100)],  # several blocks of k-rows and of rows
]


def kind(device: str) -> str:
    """What a device computes like."""
    return device.removesuffix("-emulated")


def page_bytes_for(device: str, page_bytes: int) -> int:
    """CUDA's tiles of adapters want pages of 4 KiB at least."""
    return max(page_bytes, 4096) if kind(device) == "cuda" else page_bytes


def open_backend(device: str, isa: str = "", **options: Any) -> _testing.BackendOps:
    """Skips the test, with the reason, where this build or machine lacks the device."""
    try:
        return _testing.BackendOps(device, isa, **options)
    except _testing.StatusError as error:
        pytest.skip(error.args[1])


def close(
    device: str, operation: str, found: FloatArray, expected: Array, scale: float = 1
) -> None:
    """Asserts that every element is within the tolerance; `scale` multiplies the absolute one."""
    relative, absolute = TOLERANCE[kind(device), operation]
    np.testing.assert_allclose(found, expected, rtol=relative, atol=absolute * scale)


def random(rng: np.random.Generator, *shape: int) -> FloatArray:
    """Normal values that bfloat16 holds exactly: every backend is given the same numbers."""
    return from_bits(to_bits(rng.standard_normal(shape, dtype=np.float32)))


def to_bits(x: FloatArray) -> npt.NDArray[np.uint16]:
    """The nearest bfloat16 of each value, as its bits."""
    bits = x.view(np.uint32)
    return np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, np.uint16)


def from_bits(bits: npt.NDArray[np.uint16]) -> FloatArray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def precise(rng: np.random.Generator, *shape: int) -> FloatArray:
    """Values that bfloat16 would round: a backend that keeps the wrong dtype is seen."""
    return rng.standard_normal(shape, dtype=np.float32)


def kept(w: FloatArray, dtype: str, device: str = "cpu") -> Array:
    """What a weight prepared as `dtype` holds. CUDA has bfloat16 alone."""
    rounds = dtype == "bfloat16" or kind(device) == "cuda"
    return (from_bits(to_bits(w)) if rounds else w).astype(np.float64)
