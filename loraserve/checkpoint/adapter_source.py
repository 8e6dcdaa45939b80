"""An adapter as its author trained it: one pair of matrices per adapted linear module."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve.checkpoint.safetensors_file import DTYPES
from loraserve.errors import InvalidCheckpointError

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear modules an adapter may change, in their canonical order."""
ATTENTION_MODULES = MODULES[:4]

MAX_RANK = 512
MAX_LAYERS = 1024
MAX_FEATURES = 1 << 20

# An IEEE number is NaN or infinite where all its exponent bits are set.
_EXPONENT = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
_BITS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<u4"),
    "F16": np.dtype("<u2"),
    "BF16": np.dtype("<u2"),
}
_BLOCK = 1 << 18  # elements looked at together: small enough for the cache


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """y += scaling * B A x for one linear module of one layer."""

    layer: int
    module: str
    """One of MODULES."""
    rank: int
    scaling: float
    dtype: str
    """"F32", "F16" or "BF16"; both matrices. BF16 is held as its bits, uint16."""
    a: npt.NDArray[Any]
    """A [rank, in_features]."""
    b: npt.NDArray[Any]
    """B [out_features, rank], as PEFT stores it."""

    @property
    def in_features(self) -> int:
        return int(self.a.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.b.shape[0])


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """An adapter before packing. At least one module, in any order."""

    base_name: str | None
    """The base model's name as the trainer wrote it, if it did."""
    modules: tuple[AdapterModule, ...]


def check_matrix(field: str, array: npt.NDArray[Any], dtype: str, shape: tuple[int, int]) -> None:
    """Raises InvalidCheckpointError unless `array` has this dtype and shape."""
    if dtype not in DTYPES or array.dtype != DTYPES[dtype]:
        raise InvalidCheckpointError(field, f"holds {array.dtype}, which is not dtype {dtype}")
    if array.shape != shape:
        raise InvalidCheckpointError(
            field,
            f"shape {list(array.shape)}, expected {list(shape)} ([A: rank, in; B: out, rank])",
        )


def check_finite(field: str, array: npt.NDArray[Any], dtype: str) -> None:
    """Raises InvalidCheckpointError if any element of the array (see DTYPES) is NaN or infinite."""
    exponent = _BITS[dtype].type(_EXPONENT[dtype])
    bits = np.ascontiguousarray(array).reshape(-1).view(_BITS[dtype])
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK] & exponent
        if block.max() == exponent:
            position = start + int(block.argmax())
            raise InvalidCheckpointError(field, f"element {position} is NaN or infinite")
