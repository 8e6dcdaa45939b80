"""The streaming reader under hostile headers: a typed error, or a header that says one thing only.

The mutations are plain and quick, so that `make fuzz` makes a million of them; what is rarer is
left to the property tests in test_packed_adapter_fuzz.py.
"""

import hashlib
import random
import struct
from collections.abc import Callable

import numpy as np
import pytest
from fuzz_budget import examples

from loraserve.checkpoint.adapter_source import MODULES, AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import pack
from loraserve.checkpoint.packed_header import header_bytes_for, parse_header
from loraserve.checkpoint.packed_stream import PackedStream
from loraserve.checkpoint.safetensors_file import DTYPES
from loraserve.errors import InvalidCheckpointError, UnsupportedError


def adapter(base: str, *modules: tuple[int, str, int, str]) -> bytes:
    made = []
    for layer, name, rank, dtype in modules:
        a = (np.arange(rank * 8) + 99).astype(DTYPES[dtype]).reshape(rank, 8)
        made.append(AdapterModule(layer, name, rank, 0.75, dtype, a, a.T))
    return pack(AdapterSource(base, tuple(made)), base_digest="5c" * 32 if base else None)


SEEDS = (
    adapter("", (1, "down_proj", 1, "F16")),
    adapter("org/base", (0, "q_proj", 3, "F32"), (2, "up_proj", 2, "BF16")),
    adapter("x" * 77, (0, "k_proj", 4, "BF16"), (0, "v_proj", 1, "F32")),
)
HEADERS = tuple(data[: parse_header(data).header_bytes] for data in SEEDS)
NUMBERS = (0, 1, 2, 7, 8, 63, 64, 80, 512, 513, 1 << 10, 1 << 20, (1 << 20) + 1, 4 << 20)
EDGES = (*NUMBERS, *((1 << bit) - 1 for bit in (8, 16, 31, 32, 63, 64)), 1 << 31, 1 << 40)
# (offset, size) of the prefix's numbers, and of a module's within its entry.
PREFIX = ((8, 4), (12, 4), (16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (40, 4), (44, 4))
MODULE = ((0, 4), (4, 1), (5, 1), (6, 2), (8, 4), (12, 4), (16, 8), (24, 8), (32, 8))


def flipped(data: bytearray, bits: Callable[[int], int]) -> None:
    for _ in range(1 + bits(2)):
        data[bits(16) % len(data)] ^= 1 << bits(3)


def replaced(data: bytearray, bits: Callable[[int], int]) -> None:
    at, size = PREFIX[bits(8) % len(PREFIX)]
    value = EDGES[bits(8) % len(EDGES)] if bits(1) else bits(8 * size)
    data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")


def module_changed(data: bytearray, bits: Callable[[int], int]) -> None:
    """A module's number, and then the counts and offsets that follow from it put right, so that
    the deeper checks are reached."""
    _, _, _, _, _, _, modules, name_bytes = struct.unpack_from("<8sIIQIIII", data)
    table = 80 + name_bytes + -name_bytes % 8
    at, size = MODULE[bits(8) % len(MODULE)]
    at += table + 40 * (bits(4) % modules)
    value = EDGES[bits(8) % len(EDGES)] if bits(1) else bits(8 * size)
    data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    end = 0
    for entry in range(table, table + 40 * modules, 40):
        dtype, rank, inputs, outputs = struct.unpack_from("<xBHII", data, entry + 4)
        a_bytes = rank * inputs * (4 if dtype == 0 else 2)
        b_offset = end + a_bytes
        struct.pack_into("<QQ", data, entry + 24, end % (1 << 64), b_offset % (1 << 64))
        end = b_offset + rank * outputs * (4 if dtype == 0 else 2)
    chunks = -(-end // (1 << 20))
    if 0 < chunks < 40:  # not larger, for the sake of speed
        header_bytes = header_bytes_for(name_bytes, modules, end)
        sums = table + 40 * modules
        data[sums:] = data[sums : sums + 48] * chunks
        data += bytes(header_bytes - len(data))
        struct.pack_into("<IQ", data, 12, header_bytes, end)
        struct.pack_into("<I", data, 28, chunks)


def resized(data: bytearray, bits: Callable[[int], int]) -> None:
    at = bits(16) % len(data)
    if bits(1):
        del data[at : at + 1 + bits(6)]
    else:
        data[at:at] = bits(64).to_bytes(8, "little")[: 1 + bits(3)]


MUTATIONS = (flipped, replaced, module_changed, resized)


def judge(data: bytes, split: int) -> bool:
    """Whether the stream takes the header at the start of `data`, which it must not misread."""
    stream = PackedStream()
    try:
        stream.feed(data[:split])
        stream.feed(data[split:])
    except (InvalidCheckpointError, UnsupportedError):
        return False
    header = stream.header
    if header is None:
        return False  # it waits for more
    raw = data[: header.header_bytes]
    assert header.encode() == raw
    assert header.revision == hashlib.sha256(raw).hexdigest()
    assert stream.received == len(data) <= header.size_bytes
    assert 1 <= max(entry.rank for entry in header.entries) <= 512
    assert all(entry.module in MODULES for entry in header.entries)
    return True


@pytest.mark.parametrize("seed", range(2))
def test_mutated_headers(seed: int) -> None:
    source = random.Random(f"{seed}/{examples(1)}")
    bits = source.getrandbits
    taken = 0
    count = examples(33_334)
    for _ in range(count):
        data = bytearray(HEADERS[bits(8) % len(HEADERS)])
        MUTATIONS[bits(2)](data, bits)
        if not bits(3):
            flipped(data, bits)
        raw = bytes(data)
        taken += judge(raw, bits(12) % (len(raw) + 1))
    # The mutations are not all shallow: many headers are whole and only mean something else.
    assert count / 20 < taken < count / 2
