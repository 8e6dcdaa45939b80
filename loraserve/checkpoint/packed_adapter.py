"""Packed adapters: the one form of an adapter on disk, on the wire and in host memory.

The format is specified in docs/packed-adapter.md. Reading maps the file and makes views; writing
streams, so an adapter larger than memory can be packed.
"""

import contextlib
import mmap
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve.checkpoint.adapter_source import (
    MODULES,
    AdapterModule,
    AdapterSource,
    check_finite,
    check_matrix,
)
from loraserve.checkpoint.packed_header import (
    HEADER_SIZE_BYTES,
    Bytes,
    ChunkSums,
    ModuleEntry,
    PackedHeader,
    Verification,
    base_name_bytes,
    header_bytes_for,
    header_bytes_of,
    parse_header,
    place_module,
)
from loraserve.checkpoint.peft_adapter import peft_files, read_peft_directory
from loraserve.checkpoint.safetensors_file import DTYPES
from loraserve.errors import InvalidCheckpointError, UnsupportedError


@dataclass(frozen=True, eq=False)
class PackedModule:
    """One linear module. The arrays are read-only views that keep the buffer alive."""

    layer: int
    module: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    dtype: str
    """"F32", "F16" or "BF16" (then the arrays hold its bits as uint16)."""
    a: npt.NDArray[Any]
    """A [rank, in_features], row-major."""
    b_transposed: npt.NDArray[Any]
    """B transposed [rank, out_features], row-major."""


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """A packed adapter in memory or mapped from a file."""

    header: PackedHeader
    modules: tuple[PackedModule, ...]
    """In the order of (layer, MODULES)."""
    blob: memoryview
    """All of it, header first, read-only."""

    @property
    def format_version(self) -> int:
        return self.header.format_version

    @property
    def base_name(self) -> str:
        """Empty where not known."""
        return self.header.base_name

    @property
    def base_digest(self) -> str | None:
        """64 hexadecimal digits."""
        return self.header.base_digest

    @property
    def revision(self) -> str:
        """Lower-case hexadecimal sha256 of the header; names every byte."""
        return self.header.revision

    @property
    def size_bytes(self) -> int:
        return self.header.size_bytes

    @property
    def max_rank(self) -> int:
        return self.header.max_rank

    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({module.rank for module in self.modules}))


class _Packing:
    """A checked source, its place in the blob and its data in order."""

    def __init__(self, source: AdapterSource, base_digest: str | None) -> None:
        self._name = source.base_name or ""
        self._digest = base_digest
        if base_digest is not None and not re.fullmatch(r"[0-9a-f]{64}", base_digest):
            raise InvalidCheckpointError("base_digest", "is not 64 lower-case hexadecimal digits")
        for m in source.modules:
            if m.module not in MODULES:
                raise UnsupportedError("module", f"{m.module!r}, supported: {', '.join(MODULES)}")
        self._modules = sorted(source.modules, key=lambda m: (m.layer, MODULES.index(m.module)))
        self._entries = tuple(self._place())
        self.data_bytes = self._entries[-1].end if self._entries else 0
        self.header_bytes = header_bytes_for(
            len(base_name_bytes(self._name)), len(self._entries), self.data_bytes
        )
        self._sums = ChunkSums()

    def _place(self) -> Iterator[ModuleEntry]:
        if not self._modules:
            raise InvalidCheckpointError("modules", "there are none")
        end = 0
        former: tuple[int, str] | None = None
        for index, m in enumerate(self._modules):
            field = f"{m.module} of layer {m.layer}"
            if former == (m.layer, m.module):
                raise InvalidCheckpointError(field, "occurs twice")
            former = (m.layer, m.module)
            if m.a.ndim != 2 or m.b.ndim != 2:
                raise InvalidCheckpointError(field, "A and B do not have two dimensions")
            check_matrix(field, m.a, m.dtype, (m.rank, m.in_features))
            check_matrix(field, m.b, m.dtype, (m.out_features, m.rank))
            entry = place_module(
                *(index, end, m.layer, m.module, m.in_features, m.out_features, m.rank),
                *(float(m.scaling), m.dtype),
            )
            end = entry.end
            yield entry

    def arrays(self) -> Iterator[npt.NDArray[Any]]:
        """A, then B transposed, of each module; C-contiguous. Sums are kept of what is taken."""
        for m in self._modules:
            yield self._summed(m, np.ascontiguousarray(m.a))
            yield self._summed(m, np.ascontiguousarray(m.b.T))

    def _summed(self, m: AdapterModule, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        check_finite(f"{m.module} of layer {m.layer}", array, m.dtype)
        self._sums.update(array)
        return array

    def header(self) -> PackedHeader:
        """Once all arrays were taken."""
        return PackedHeader(self._name, self._digest, self._entries, self._sums.table())


def _pack(source: AdapterSource, base_digest: str | None) -> bytearray:
    packing = _Packing(source, base_digest)
    out = bytearray(packing.header_bytes + packing.data_bytes)
    at = packing.header_bytes
    for array in packing.arrays():
        out[at : at + array.nbytes] = array.reshape(-1).view(np.uint8).data
        at += array.nbytes
    out[: packing.header_bytes] = packing.header().encode()
    return out


def pack(source: AdapterSource, *, base_digest: str | None = None) -> bytes:
    """The packed adapter. `base_digest`: of the base model, 64 lower-case hexadecimal digits.

    Raises InvalidCheckpointError or UnsupportedError. For large adapters see `write_packed`.
    """
    return bytes(_pack(source, base_digest))


def write_packed(source: AdapterSource, path: Path, *, base_digest: str | None = None) -> str:
    """Packs into a file, one matrix at a time; the revision.

    The file appears under its name whole and synced, or not at all; one that was there is
    replaced, and who has it mapped keeps the old one. Raises as `pack`, and OSError.
    """
    packing = _Packing(source, base_digest)
    staged = path.parent / f".{path.name}.{secrets.token_hex(8)}.part"
    try:
        with staged.open("xb") as file:
            file.seek(packing.header_bytes)
            for array in packing.arrays():
                file.write(array.reshape(-1).view(np.uint8).data)
            header = packing.header()
            file.seek(0)
            file.write(header.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return header.revision


def _view(blob: memoryview, at: int, dtype: str, shape: tuple[int, int]) -> npt.NDArray[Any]:
    return np.frombuffer(blob, DTYPES[dtype], shape[0] * shape[1], at).reshape(shape)


def _verify(header: PackedHeader, blob: memoryview, verify: Verification) -> None:
    for index in range(header.chunk_count):
        start, length = header.chunk_range(index)
        header.verify_chunk(index, blob[start : start + length], verify)


def parse_packed(
    buffer: Bytes | mmap.mmap, *, verify: Verification = "xxh3", revision: str | None = None
) -> PackedAdapter:
    """A packed adapter in memory, as views of `buffer`, which must not change from now on.

    `verify` checks the data against the header's sums ("sha256": both kinds) and refuses NaN and
    infinite weights; "none" is for bytes that were checked before. `revision`, where given, is what
    the header must hash to: with it, success means exactly the adapter that was asked for. Raises
    InvalidCheckpointError or UnsupportedError.
    """
    if verify not in ("xxh3", "sha256", "none"):
        raise ValueError(f"verify: {verify!r}")
    blob = memoryview(buffer).toreadonly().cast("B")
    header = parse_header(blob, revision=revision)
    if len(blob) != header.size_bytes:
        raise InvalidCheckpointError(
            "size_bytes", f"{len(blob)} bytes, the header says {header.size_bytes}"
        )
    if verify != "none":
        _verify(header, blob, verify)
    adapter = view_packed(header, blob)
    if verify != "none":
        for m in adapter.modules:
            check_finite(f"{m.module} of layer {m.layer}", m.a, m.dtype)
            check_finite(f"{m.module} of layer {m.layer}", m.b_transposed, m.dtype)
    return adapter


def view_packed(header: PackedHeader, blob: memoryview) -> PackedAdapter:
    """Views of a whole packed adapter in memory, which was checked and does not change any more.
    `blob`: read-only, `header.size_bytes` bytes, header first."""
    modules = []
    for e in header.entries:
        at = header.header_bytes
        a = _view(blob, at + e.a_offset, e.dtype, (e.rank, e.in_features))
        b = _view(blob, at + e.b_offset, e.dtype, (e.rank, e.out_features))
        modules.append(
            PackedModule(
                *(e.layer, e.module, e.in_features, e.out_features, e.rank, e.scaling, e.dtype),
                *(a, b),
            )
        )
    return PackedAdapter(header, tuple(modules), blob)


def open_packed(
    path: Path, *, verify: Verification = "xxh3", revision: str | None = None
) -> PackedAdapter:
    """A packed file, mapped: views, no copies. As `parse_packed`; OSError as `open` does.

    The file must not be changed in place while it is mapped; replacing it is fine.
    """
    with path.open("rb") as file:
        header_bytes_of(file.read(HEADER_SIZE_BYTES))  # refuses other files before mapping them
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return parse_packed(mapping, verify=verify, revision=revision)


def check_adapter_path(path: Path) -> None:
    """What a look tells of a source of `load_adapter_source`: that its files are there. Raises
    InvalidCheckpointError, UnsupportedError."""
    if path.is_dir():
        peft_files(path)
    elif not path.is_file():
        raise InvalidCheckpointError(str(path), "is neither a PEFT directory nor a packed file")


def load_adapter_source(path: Path) -> PackedAdapter:
    """A PEFT directory, packed in memory, or a packed file, mapped and verified.

    Raises InvalidCheckpointError or UnsupportedError.
    """
    check_adapter_path(path)
    if path.is_dir():
        # Packing has checked every weight.
        return parse_packed(_pack(read_peft_directory(path), None), verify="none")
    return open_packed(path)


def describe(adapter: PackedAdapter) -> dict[str, Any]:
    """Facts about an adapter as plain JSON values, for people and scripts."""
    header = adapter.header
    return {
        "revision": adapter.revision,
        "format_version": adapter.format_version,
        "base_name": adapter.base_name or None,
        "base_digest": adapter.base_digest,
        "size_bytes": adapter.size_bytes,
        "header_bytes": header.header_bytes,
        "data_bytes": header.data_bytes,
        "chunks": header.chunk_count,
        "parameters": sum(m.rank * (m.in_features + m.out_features) for m in adapter.modules),
        "max_rank": adapter.max_rank,
        "ranks": list(adapter.ranks()),
        "layers": len({m.layer for m in adapter.modules}),
        "dtypes": sorted({m.dtype for m in adapter.modules}),
        "modules": [
            {
                "layer": m.layer,
                "module": m.module,
                "in_features": m.in_features,
                "out_features": m.out_features,
                "rank": m.rank,
                "scaling": m.scaling,
                "dtype": m.dtype,
            }
            for m in adapter.modules
        ],
    }
