"""Whatever bytes arrive: a typed error, or exactly the adapter that was packed."""

from pathlib import Path

import numpy as np
import pytest
from fuzz_budget import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraserve.checkpoint.adapter_source import MODULES, AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import PackedAdapter, open_packed, pack, parse_packed
from loraserve.checkpoint.packed_header import parse_header
from loraserve.checkpoint.safetensors_file import DTYPES
from loraserve.errors import InvalidCheckpointError, UnsupportedError

TYPED = (InvalidCheckpointError, UnsupportedError)


def small(layer: int, name: str, rank: int, dtype: str) -> AdapterModule:
    values = np.arange(rank * 8, dtype=np.uint16) + 99  # small numbers in all three dtypes
    a = values.astype(DTYPES[dtype])
    return AdapterModule(layer, name, rank, 0.75, dtype, a.reshape(rank, 8), a.reshape(8, rank))


SOURCES = (
    AdapterSource("org/base", (small(0, "q_proj", 3, "F32"), small(2, "up_proj", 2, "BF16"))),
    AdapterSource(None, (small(1, "down_proj", 1, "F16"),)),
    AdapterSource("x" * 77, tuple(small(i, name, 1, "F32") for i in (0, 3) for name in MODULES)),
)
BLOBS = tuple(pack(source, base_digest="5c" * 32) for source in SOURCES)


def content(adapter: PackedAdapter) -> list[object]:
    facts: list[object] = [adapter.base_name, adapter.base_digest, adapter.revision]
    for m in adapter.modules:
        facts += [m.layer, m.module, m.rank, m.scaling, m.dtype, m.in_features, m.out_features]
        facts += [m.a.tobytes(), m.b_transposed.tobytes()]
    return facts


def parsed(data: bytes, **options: str) -> PackedAdapter | None:
    """None for a typed error; every other exception fails the test."""
    try:
        return parse_packed(data, **options)  # type: ignore[arg-type]
    except TYPED:
        return None


def check(data: bytes, original: bytes) -> None:
    wanted = parse_packed(original)
    asked = parsed(data, revision=wanted.revision)
    assert asked is None or content(asked) == content(wanted)
    assert (asked is not None) == (data == original)
    parsed(data, verify="none")
    quick, free = parsed(data), parsed(data, verify="sha256")
    assert quick is None or (quick.revision == wanted.revision) == (data == original)
    if free is not None:
        # Accepted: then it is canonical, and another adapter only under another name.
        assert (free.revision == wanted.revision) == (data == original)
        source = AdapterSource(
            free.base_name,
            tuple(
                AdapterModule(m.layer, m.module, m.rank, m.scaling, m.dtype, m.a, m.b_transposed.T)
                for m in free.modules
            ),
        )
        assert pack(source, base_digest=free.base_digest) == data


WHICH = st.integers(0, len(BLOBS) - 1)


@settings(max_examples=examples(400), deadline=None)
@given(WHICH, st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 255)), max_size=4))
def test_flipped_bytes(which: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(BLOBS[which])
    for at, mask in flips:
        data[at % len(data)] ^= mask
    check(bytes(data), BLOBS[which])


@pytest.mark.parametrize("which", range(len(BLOBS)))
def test_every_single_bit_of_the_header_matters(which: int) -> None:
    blob = BLOBS[which]
    revision = parse_packed(blob).revision
    for bit in range(parse_header(blob).header_bytes * 8):
        data = bytearray(blob)
        data[bit // 8] ^= 1 << bit % 8
        found = parsed(bytes(data))
        assert found is None or found.revision != revision


@settings(max_examples=examples(200), deadline=None)
@given(WHICH, st.integers(0, 1 << 14), st.binary(max_size=99))
def test_truncated_and_extended(which: int, cut: int, tail: bytes) -> None:
    blob = BLOBS[which]
    check(blob[: cut % (len(blob) + 1)], blob)
    check(blob[: cut % (len(blob) + 1)] + tail, blob)
    check(blob + tail, blob)


@settings(max_examples=examples(200), deadline=None)
@given(WHICH, WHICH, st.integers(0, 1 << 14), st.integers(0, 1 << 14))
def test_spliced_from_two_adapters(one: int, other: int, here: int, there: int) -> None:
    a, b = BLOBS[one], BLOBS[other]
    check(a[: here % (len(a) + 1)] + b[there % (len(b) + 1) :], a)
    check(a[: parse_header(a).header_bytes] + b[parse_header(b).header_bytes :], a)


FIELDS = ((8, 4), (12, 4), (16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (40, 4), (44, 4))
MODULE_FIELDS = ((0, 4), (4, 1), (5, 1), (6, 2), (8, 4), (12, 4), (16, 8), (24, 8), (32, 8))


@settings(max_examples=examples(400), deadline=None)
@given(
    st.sampled_from(FIELDS + tuple((88 + at, size) for at, size in MODULE_FIELDS)),
    st.one_of(
        st.integers(0, (1 << 64) - 1),
        st.integers(0, 2000),
        st.integers(0, 63).map(lambda bit: 1 << bit),
        st.integers(0, 63).map(lambda bit: (1 << bit) - 1),
    ),
)
def test_replaced_numbers(field: tuple[int, int], value: int) -> None:
    at, size = field
    data = bytearray(BLOBS[0])
    data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    check(bytes(data), BLOBS[0])


@settings(max_examples=examples(200), deadline=None)
@given(st.binary(max_size=400))
@example(b"LORAPACK" + bytes(72))
def test_noise(noise: bytes) -> None:
    check(noise, BLOBS[1])
    check(BLOBS[1][:16] + noise, BLOBS[1])
    check(BLOBS[1][:80] + noise, BLOBS[1])


def test_files_behave_like_bytes(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    for cut in range(0, len(BLOBS[0]), 7):
        path.write_bytes(BLOBS[0][:cut])
        with pytest.raises(TYPED):
            open_packed(path)
