"""The header of a packed adapter: what docs/packed-adapter.md specifies, and nothing else.

A header has exactly one encoding. Parsing therefore ends with encoding again and comparing, so no
two byte strings, and no two revisions, mean the same adapter.
"""

import hashlib
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from loraserve.checkpoint.adapter_source import MAX_FEATURES, MAX_LAYERS, MAX_RANK, MODULES
from loraserve.checkpoint.safetensors_file import DTYPES
from loraserve.errors import InvalidCheckpointError, UnsupportedError

MAGIC = b"LORAPACK"
FORMAT_VERSION = 1
CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 4 << 20
MAX_BASE_NAME_BYTES = 1024
MAX_MODULES = MAX_LAYERS * len(MODULES)
ALIGNMENT = 64
HEADER_SIZE_BYTES = 16
"""So many bytes of the header tell its length, see `header_bytes_of`."""

DTYPE_NAMES = ("F32", "F16", "BF16")
_HAS_BASE_DIGEST = 1
_MAX_SCALING = float(np.finfo(np.float32).max)

# magic, version, header bytes, data bytes, chunk bytes, chunks, modules, name bytes, flags,
# reserved, base digest
_PREFIX = struct.Struct("<8sIIQIIIIII32s")
# layer, module, dtype, rank, in features, out features, scaling, offset of A, offset of B
_MODULE = struct.Struct("<IBBHIIdQQ")
_CHUNK = struct.Struct("<32s16s")  # sha256, xxh3-128 (canonical, big-endian)

Verification: TypeAlias = Literal["xxh3", "sha256", "none"]
Bytes: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ModuleEntry:
    """Where one module's matrices lie. Offsets are in bytes from the start of the data."""

    layer: int
    module: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    dtype: str
    a_offset: int
    """A [rank, in_features]."""
    b_offset: int
    """B transposed [rank, out_features]."""

    @property
    def end(self) -> int:
        """Of B, and so of the module."""
        return self.b_offset + self.rank * self.out_features * DTYPES[self.dtype].itemsize


def _pad(size: int, to: int) -> int:
    return -size % to


def base_name_bytes(name: str) -> bytes:
    """The name as the header stores it. Raises InvalidCheckpointError."""
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in name):
        raise InvalidCheckpointError("base_name", "has control characters")
    try:
        raw = name.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidCheckpointError("base_name", "is not Unicode text") from None
    if len(raw) > MAX_BASE_NAME_BYTES:
        raise InvalidCheckpointError(
            "base_name", f"{len(raw)} bytes, the limit is {MAX_BASE_NAME_BYTES}"
        )
    return raw


def _check_entry(field: str, entry: ModuleEntry) -> None:
    for name, value, limit in (
        ("rank", entry.rank, MAX_RANK),
        ("in_features", entry.in_features, MAX_FEATURES),
        ("out_features", entry.out_features, MAX_FEATURES),
    ):
        if not 1 <= value <= limit:
            raise InvalidCheckpointError(f"{field}.{name}", f"{value} is not within 1 and {limit}")
    if not 0 <= entry.layer < MAX_LAYERS:
        raise InvalidCheckpointError(
            f"{field}.layer", f"{entry.layer} is not within 0 and {MAX_LAYERS - 1}"
        )
    if not math.isfinite(entry.scaling) or abs(entry.scaling) > _MAX_SCALING:
        raise InvalidCheckpointError(f"{field}.scaling", "is not a finite float32")


def place_module(
    index: int,
    at: int,
    layer: int,
    module: str,
    in_features: int,
    out_features: int,
    rank: int,
    scaling: float,
    dtype: str,
) -> ModuleEntry:
    """The entry of module number `index`, whose data begin at `at`. Raises InvalidCheckpointError.

    There is no padding, so 16-bit data of an odd count would leave float32 data after it unaligned:
    refused, since no reader could use them in place.
    """
    item = DTYPES[dtype].itemsize
    entry = ModuleEntry(
        *(layer, module, in_features, out_features, rank, scaling, dtype),
        at,
        at + rank * in_features * item,
    )
    _check_entry(f"modules[{index}]", entry)
    if at % item:
        raise InvalidCheckpointError(
            f"modules[{index}].dtype", f"{dtype} data would begin at byte {at}, unaligned"
        )
    return entry


@dataclass(frozen=True)
class PackedHeader:
    """A checked header. `chunk_table` holds sha256 and xxh3-128 of each chunk of the data."""

    base_name: str
    """Empty where not known."""
    base_digest: str | None
    """64 hexadecimal digits."""
    entries: tuple[ModuleEntry, ...]
    chunk_table: bytes
    format_version: int = FORMAT_VERSION

    @cached_property
    def data_bytes(self) -> int:
        return self.entries[-1].end

    @cached_property
    def header_bytes(self) -> int:
        return header_bytes_for(
            len(base_name_bytes(self.base_name)), len(self.entries), self.data_bytes
        )

    @property
    def size_bytes(self) -> int:
        """Of the whole packed adapter."""
        return self.header_bytes + self.data_bytes

    @property
    def max_rank(self) -> int:
        return max(entry.rank for entry in self.entries)

    @property
    def chunk_count(self) -> int:
        return chunk_count_for(self.data_bytes)

    @cached_property
    def revision(self) -> str:
        return hashlib.sha256(self.encode()).hexdigest()

    def encode(self) -> bytes:
        """The header bytes, `header_bytes` of them."""
        name = base_name_bytes(self.base_name)
        out = bytearray(
            _PREFIX.pack(
                *(MAGIC, self.format_version, self.header_bytes, self.data_bytes, CHUNK_BYTES),
                *(self.chunk_count, len(self.entries), len(name)),
                *(0 if self.base_digest is None else _HAS_BASE_DIGEST, 0),
                bytes(32) if self.base_digest is None else bytes.fromhex(self.base_digest),
            )
        )
        out += name + bytes(_pad(len(name), 8))
        for e in self.entries:
            out += _MODULE.pack(
                *(e.layer, MODULES.index(e.module), DTYPE_NAMES.index(e.dtype), e.rank),
                *(e.in_features, e.out_features, e.scaling, e.a_offset, e.b_offset),
            )
        out += self.chunk_table
        return bytes(out) + bytes(_pad(len(out), ALIGNMENT))

    def chunk_range(self, index: int) -> tuple[int, int]:
        """(offset in the packed adapter, length) of a chunk, both in bytes."""
        if not 0 <= index < self.chunk_count:
            raise InvalidCheckpointError(f"chunk {index}", f"there are {self.chunk_count}")
        start = index * CHUNK_BYTES
        return self.header_bytes + start, min(CHUNK_BYTES, self.data_bytes - start)

    def verify_chunk(self, index: int, data: Bytes, algorithm: Verification = "xxh3") -> None:
        """Raises InvalidCheckpointError unless `data` is exactly that chunk.

        "sha256" checks both sums: a header whose sums disagree must not enter a cluster, where
        every later reader goes by xxh3.
        """
        _, length = self.chunk_range(index)
        size = memoryview(data).nbytes
        if size != length:
            raise InvalidCheckpointError(f"chunk {index}", f"{size} bytes, expected {length}")
        sha256, xxh3 = _CHUNK.unpack_from(self.chunk_table, index * _CHUNK.size)
        if algorithm == "sha256" and hashlib.sha256(data).digest() != sha256:
            raise InvalidCheckpointError(f"chunk {index}", "does not have its sha256 sum")
        if algorithm != "none" and xxhash.xxh3_128_digest(data) != xxh3:
            raise InvalidCheckpointError(f"chunk {index}", "does not have its xxh3 sum")


class ChunkSums:
    """Builds the chunk table of data that come in pieces of any size."""

    def __init__(self) -> None:
        self._table = bytearray()
        self._begin()

    def _begin(self) -> None:
        self._filled, self._sha256, self._xxh3 = 0, hashlib.sha256(), xxhash.xxh3_128()

    def update(self, array: npt.NDArray[Any]) -> None:
        """Appends the bytes of a C-contiguous array."""
        rest = array.reshape(-1).view(np.uint8).data
        while rest:
            room = CHUNK_BYTES - self._filled
            piece, rest = rest[:room], rest[room:]
            self._sha256.update(piece)
            self._xxh3.update(piece)
            self._filled += len(piece)
            if self._filled == CHUNK_BYTES:
                self._end()

    def _end(self) -> None:
        self._table += _CHUNK.pack(self._sha256.digest(), self._xxh3.digest())
        self._begin()

    def table(self) -> bytes:
        """Call once, after the last `update`."""
        if self._filled:
            self._end()
        return bytes(self._table)


def chunk_count_for(data_bytes: int) -> int:
    return -(-data_bytes // CHUNK_BYTES)


def header_bytes_for(name_bytes: int, modules: int, data_bytes: int) -> int:
    """Raises UnsupportedError where the header would be over its limit."""
    size = _PREFIX.size + name_bytes + _pad(name_bytes, 8)
    size += modules * _MODULE.size + chunk_count_for(data_bytes) * _CHUNK.size
    size += _pad(size, ALIGNMENT)
    if size > MAX_HEADER_BYTES:
        raise UnsupportedError(
            "header", f"{size} bytes for {data_bytes} of data, the limit is {MAX_HEADER_BYTES}"
        )
    return size


def header_bytes_of(start: Bytes) -> int:
    """The header's length in bytes, from the first HEADER_SIZE_BYTES of a packed adapter.

    Raises InvalidCheckpointError or UnsupportedError (a version we do not know)."""
    raw = bytes(memoryview(start)[:HEADER_SIZE_BYTES])
    if len(raw) < HEADER_SIZE_BYTES or raw[:8] != MAGIC:
        raise InvalidCheckpointError("magic", "not a packed adapter")
    version, size = struct.unpack_from("<II", raw, 8)
    if version != FORMAT_VERSION:
        raise UnsupportedError("format_version", f"{version}, supported: {FORMAT_VERSION}")
    if not _PREFIX.size <= size <= MAX_HEADER_BYTES:
        raise InvalidCheckpointError(
            "header_bytes", f"{size} is not within {_PREFIX.size} and {MAX_HEADER_BYTES}"
        )
    return int(size)


def missing_header_bytes(start: Bytes) -> int:
    """How many bytes are known to be wanting after `start` before a header is whole; 0 where it
    is. Raises as `header_bytes_of`."""
    if len(start) < HEADER_SIZE_BYTES:
        return HEADER_SIZE_BYTES - len(start)
    return max(0, header_bytes_of(start) - len(start))


def _parse_entries(raw: bytes, at: int, count: int) -> Iterable[ModuleEntry]:
    end = 0
    former = (-1, -1)
    for index in range(count):
        layer, module, dtype, rank, inputs, outputs, scaling, _, _ = _MODULE.unpack_from(
            raw, at + index * _MODULE.size
        )
        field = f"modules[{index}]"
        if module >= len(MODULES):
            raise InvalidCheckpointError(f"{field}.module", f"{module}, there are {len(MODULES)}")
        if dtype >= len(DTYPE_NAMES):
            raise InvalidCheckpointError(f"{field}.dtype", f"{dtype}, there are {len(DTYPE_NAMES)}")
        if (layer, module) <= former:
            raise InvalidCheckpointError(field, "is not in the order of (layer, module)")
        former = (layer, module)
        entry = place_module(
            *(index, end, layer, MODULES[module], inputs, outputs, rank, scaling),
            DTYPE_NAMES[dtype],
        )
        end = entry.end
        yield entry


def parse_header(data: Bytes, *, revision: str | None = None) -> PackedHeader:
    """The header at the start of `data`, which may go on after it.

    `revision`, where given, is what the header must hash to. Raises InvalidCheckpointError or
    UnsupportedError (a version we do not know); never allocates more than the header's size times
    a small factor.
    """
    size = header_bytes_of(data)
    raw = bytes(memoryview(data)[:size])
    if len(raw) < size:
        raise InvalidCheckpointError("header", f"ends after {len(raw)} of {size} bytes")
    if revision is not None and hashlib.sha256(raw).hexdigest() != revision:
        raise InvalidCheckpointError("revision", f"the header is not that of {revision}")
    _, _, _, data_bytes, _, _, modules, name_bytes, flags, _, digest = _PREFIX.unpack_from(raw)
    if not 1 <= modules <= MAX_MODULES:
        raise InvalidCheckpointError("module_count", f"{modules} is not within 1 and {MAX_MODULES}")
    if name_bytes > MAX_BASE_NAME_BYTES:
        raise InvalidCheckpointError(
            "base_name", f"{name_bytes} bytes, the limit is {MAX_BASE_NAME_BYTES}"
        )
    # With the three counts checked against the length, every read below is inside `raw`.
    if header_bytes_for(name_bytes, modules, data_bytes) != size:
        raise InvalidCheckpointError("header_bytes", f"{size} does not fit what it holds")
    try:
        name = raw[_PREFIX.size : _PREFIX.size + name_bytes].decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidCheckpointError("base_name", "is not UTF-8") from None
    base_name_bytes(name)
    at = _PREFIX.size + name_bytes + _pad(name_bytes, 8)
    entries = tuple(_parse_entries(raw, at, modules))
    if entries[-1].end != data_bytes:
        raise InvalidCheckpointError(
            "data_bytes", f"{data_bytes}, but the modules take {entries[-1].end}"
        )
    at += modules * _MODULE.size
    table = raw[at : at + chunk_count_for(data_bytes) * _CHUNK.size]
    base_digest = digest.hex() if flags & _HAS_BASE_DIGEST else None
    header = PackedHeader(name, base_digest, entries, table)
    if header.encode() != raw:
        raise InvalidCheckpointError(
            "header", "is not canonical (offsets, chunk size, flags, reserved or padding bytes)"
        )
    return header
