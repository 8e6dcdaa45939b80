"""Safetensors files, mapped and viewed, never copied and never trusted.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data. The tensors
must cover the data exactly, in some order, without gap or overlap, as the reference reader asks.
"""

import mmap
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve.checkpoint.bounded_json import parse_object
from loraserve.errors import InvalidCheckpointError, UnsupportedError

MAX_HEADER_BYTES = 4 << 20
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 48

# bfloat16 has no NumPy dtype: its bits are viewed as uint16.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class TensorView:
    """One tensor. `data` is read-only and keeps the mapping alive.

    `dtype` is the name in the file; for "BF16", `data` holds the bits as uint16.
    """

    name: str
    dtype: str
    data: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def to_float32(self) -> npt.NDArray[np.float32]:
        """A float32 copy; exact for all three dtypes."""
        if self.dtype == "BF16":
            return (self.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.data.astype(np.float32)


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(name: str, entry: Any) -> _Entry:
    field = f"tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidCheckpointError(field, "needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise InvalidCheckpointError(field, "dtype is not a string")
    if dtype not in DTYPES:
        raise UnsupportedError(field, f"dtype {dtype!r}, supported: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(map(_natural, shape)):
        raise InvalidCheckpointError(field, "shape is not a list of non-negative integers")
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidCheckpointError(field, f"{len(shape)} dimensions, limit {MAX_DIMENSIONS}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise InvalidCheckpointError(field, "data_offsets are not two non-negative integers")
    begin, end = offsets
    # Python integers do not overflow, so the product of a hostile shape is exact.
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise InvalidCheckpointError(field, "shape, dtype and data_offsets disagree")
    # A dimension of 0 makes the tensor empty, but NumPy counts the others.
    if prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise InvalidCheckpointError(field, f"shape of more than {MAX_ELEMENTS} elements")
    return _Entry(name, dtype, tuple(shape), begin, end)


def _parse_header(path: Path, raw: bytes, data_bytes: int) -> list[_Entry]:
    header = parse_object(f"{path.name} header", raw, MAX_HEADER_BYTES)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise InvalidCheckpointError(path.name, "__metadata__ is not an object")
    entries = [_parse_entry(name, entry) for name, entry in header.items()]
    expected = 0
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != expected:
            raise InvalidCheckpointError(
                f"tensor {entry.name!r}", f"begins at {entry.begin}, expected {expected}"
            )
        expected = entry.end
    if expected != data_bytes:
        raise InvalidCheckpointError(
            path.name, f"the header describes {expected} data bytes, the file has {data_bytes}"
        )
    return entries


def open_safetensors(path: Path) -> dict[str, TensorView]:
    """Every tensor of the file by name.

    Raises InvalidCheckpointError (broken) or UnsupportedError (a dtype we lack); OSError as
    `open` does.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 8:
            raise InvalidCheckpointError(path.name, f"{size} bytes, too short for a header")
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(MAX_HEADER_BYTES, size - 8):
            raise InvalidCheckpointError(
                path.name,
                f"header of {header_bytes} bytes, the limit is {MAX_HEADER_BYTES} "
                f"and the file has {size - 8} after the length",
            )
        start = 8 + header_bytes
        entries = _parse_header(path, file.read(header_bytes), size - start)
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        e.name: TensorView(
            e.name,
            e.dtype,
            np.frombuffer(mapping, DTYPES[e.dtype], prod(e.shape), start + e.begin).reshape(
                e.shape
            ),
        )
        for e in entries
    }
