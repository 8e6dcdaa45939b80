"""Arrays of other libraries are read exactly, or refused."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from loraserve.checkpoint.peft_adapter import read_arrays
from loraserve.errors import InvalidCheckpointError, UnsupportedError

STEM = "base_model.model.model.layers"
Q_PROJ = f"{STEM}.0.self_attn.q_proj"


def pair(rank: int = 2, stem: str = Q_PROJ, dtype: Any = np.float32) -> dict[str, Any]:
    return {
        f"{stem}.lora_A.weight": np.ones((rank, 6), dtype),
        f"{stem}.lora_B.weight": np.ones((4, rank), dtype),
    }


def as_torch(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int16)).view(torch.bfloat16)


def refused(
    kind: type[Exception], words: str, arrays: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    with pytest.raises(kind, match=words):
        read_arrays(arrays, config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_is_found_in_every_dtype(dtype: torch.dtype, value: float) -> None:
    arrays = {name: torch.from_numpy(a).to(dtype) for name, a in pair().items()}
    arrays[f"{Q_PROJ}.lora_B.weight"][3, 1] = torch.finfo(dtype).max
    assert read_arrays(arrays, {"r": 2}).modules
    arrays[f"{Q_PROJ}.lora_B.weight"][3, 1] = value
    refused(InvalidCheckpointError, "lora_B.*element 7 is NaN or infinite", arrays, {"r": 2})


class OnAnotherDevice:
    """A GPU array: exports to the CPU only where its library is new enough."""

    def __init__(self, tensor: torch.Tensor, copies: bool) -> None:
        self._tensor, self._copies = tensor, copies

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, dl_device: tuple[int, int]) -> Any:
        if not self._copies:
            raise BufferError("cannot copy to the CPU")
        assert dl_device == (1, 0)
        return self._tensor.__dlpack__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arrays_of_another_device_are_copied_or_refused(dtype: torch.dtype) -> None:
    arrays = {name: torch.from_numpy(a).to(dtype) for name, a in pair().items()}
    moved = {name: OnAnotherDevice(t, True) for name, t in arrays.items()}
    ours, same = read_arrays(moved, {"r": 2}), read_arrays(arrays, {"r": 2})
    assert np.array_equal(ours.modules[0].a, same.modules[0].a)
    stuck = {name: OnAnotherDevice(t, False) for name, t in arrays.items()}
    refused(UnsupportedError, "cannot copy to the CPU", stuck, {"r": 2})


def test_strided_and_bfloat16_tensors_are_read_exactly() -> None:
    a = torch.randn(6, 2).to(torch.bfloat16).T
    b = torch.randn(8, 2).to(torch.bfloat16)[::2]
    arrays = {f"{Q_PROJ}.lora_A.weight": a, f"{Q_PROJ}.lora_B.weight": b}
    module = read_arrays(arrays, {"r": 2}).modules[0]
    assert module.dtype == "BF16"
    assert module.a.flags.c_contiguous
    assert module.b.flags.c_contiguous
    assert torch.equal(as_torch(module.a), a)
    assert torch.equal(as_torch(module.b), b)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((2, 6)), "dtype float64"),
        (np.ones((2, 6), np.uint16), "dtype uint16"),
        (np.ones((2, 6), ">f4"), "dtype >f4"),
        (torch.ones(2, 6, dtype=torch.int16), "dtype int16"),
        (torch.ones(2, 6, requires_grad=True), "no CPU array through DLPack"),
        ([[1.0] * 6] * 2, "list is no array"),
        (None, "NoneType is no array"),
    ],
    ids=lambda value: str(value)[:18],
)
def test_what_is_no_float_array_is_refused_by_name(array: Any, words: str) -> None:
    name = f"{Q_PROJ}.lora_A.weight"
    refused(UnsupportedError, f"{re.escape(name)}': {words}", pair() | {name: array}, {"r": 2})
