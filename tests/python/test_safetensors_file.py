"""The reader against the reference writer, and against broken and hostile files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_budget import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loraserve.checkpoint.safetensors_file import MAX_HEADER_BYTES, open_safetensors
from loraserve.errors import InvalidCheckpointError, LoraServeError, UnsupportedError


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def f32(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_reference_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5).to(dtype),
        "b.c": torch.randn(7).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    views = open_safetensors(tmp_path / "x.safetensors")
    assert views.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert views[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(views[name].to_float32(), tensor.float().numpy())
        assert not views[name].data.flags.writeable


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": f32([2], 0, 8), "b": f32([2], 4, 12)}, bytes(12), "'b': begins at 4"),
        ({"a": f32([1], 4, 8)}, bytes(8), "'a': begins at 4"),
        ({"a": f32([1], 0, 4)}, bytes(8), "describes 4 data bytes"),
        ({"a": f32([2], 0, 8)}, bytes(4), "describes 8 data bytes"),
        ({"a": f32([2**62, 4], 0, 0)}, b"", "'a': shape, dtype and data_offsets disagree"),
        ({"a": f32([-1], 0, 4)}, bytes(4), "'a': shape"),
        ({"a": f32([1], 4, 0)}, bytes(4), "'a': shape, dtype"),
        ({"a": f32([True], 0, 4)}, bytes(4), "'a': shape"),
        ({"a": f32([1] * 9, 0, 4)}, bytes(4), "9 dimensions, limit 8"),
        ({"a": {"dtype": "F32"}}, b"", "needs exactly"),
        ({"a": 3}, b"", "needs exactly"),
        (b'{"a":1,"a":2}', b"", "'a' occurs twice"),
        (b"[]", b"", "not a JSON object"),
        (b"\xff\xfe", b"", "not JSON"),
        (b'{"a":NaN}', b"", "NaN is not JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "nested deeper than 16"),
        ({"__metadata__": 1}, b"", "__metadata__"),
    ],
)
def test_hostile_headers_are_refused_by_name(
    tmp_path: Path, header: Any, data: bytes, match: str
) -> None:
    with pytest.raises(InvalidCheckpointError, match=match):
        open_safetensors(write(tmp_path / "x.safetensors", header, data))


def test_an_unsupported_dtype_is_named(tmp_path: Path) -> None:
    header = {"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}
    with pytest.raises(UnsupportedError, match="'a': dtype 'I64'"):
        open_safetensors(write(tmp_path / "x.safetensors", header, bytes(8)))


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1, 3])
def test_a_header_length_past_its_limits_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(InvalidCheckpointError, match=f"header of {length} bytes"):
        open_safetensors(path)


@settings(
    max_examples=examples(300),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    cut=st.integers(0, 200),
    flips=st.lists(st.tuples(st.integers(0, 199), st.integers(1, 255)), max_size=4),
)
def test_damage_ends_in_a_typed_error_or_a_consistent_view(
    tmp_path: Path, cut: int, flips: list[tuple[int, int]]
) -> None:
    path = write(tmp_path / "x", {"a": f32([2, 3], 0, 24), "b": f32([4], 24, 40)}, bytes(40))
    raw = bytearray(path.read_bytes()[: cut or None])
    for at, bits in flips:
        if at < len(raw):
            raw[at] ^= bits
    path.write_bytes(raw)
    try:
        views = open_safetensors(path)
    except LoraServeError:
        return
    assert sum(view.data.nbytes for view in views.values()) <= len(raw)
