"""Arrays of other libraries as NumPy views, through DLPack and without importing those libraries.

NumPy has no bfloat16 and refuses it in DLPack. A bfloat16 export is therefore relabelled as 16-bit
unsigned integers before NumPy takes it over: the consumer of a capsule owns its struct, and the
producer's deleter frees it as always.
"""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from loraserve.errors import UnsupportedError

_CPU = 1
_UINT, _BFLOAT = 1, 4
_NAMES = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16"}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )  # the rest is not looked at


_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Export:
    """Hands one capsule, already made, to `numpy.from_dlpack`."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: object) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0)


def _from_dlpack(field: str, array: Any) -> tuple[str, npt.NDArray[Any]]:
    try:
        on_cpu = int(array.__dlpack_device__()[0]) == _CPU
        # dl_device asks the producer for a copy on the CPU; libraries before DLPack 1.0 refuse.
        capsule = array.__dlpack__() if on_cpu else array.__dlpack__(dl_device=(_CPU, 0))
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
        bfloat = (tensor.code, tensor.bits, tensor.lanes) == (_BFLOAT, 16, 1)
        if bfloat:
            tensor.code = _UINT
        view = np.from_dlpack(_Export(capsule))
    except Exception as error:  # whatever the other library raises
        raise UnsupportedError(field, f"no CPU array through DLPack: {error}") from None
    return ("BF16" if bfloat else _NAMES.get(view.dtype, str(view.dtype))), view


def float_view(field: str, array: Any) -> tuple[str, npt.NDArray[Any]]:
    """("F32" | "F16" | "BF16", the values; BF16 as its bits in uint16), no copy on the CPU.

    Accepted: NumPy arrays of float32 or float16, or of the bfloat16 of ml_dtypes, and anything with
    `__dlpack__` and `__dlpack_device__` of these three dtypes (a torch tensor must not require a
    gradient). An array on another device is copied if its library offers that. Integers are never
    taken for bfloat16 bits. Raises UnsupportedError.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.name == "bfloat16" and array.dtype.itemsize == 2:
            return "BF16", array.view("<u2")
        name, view = _NAMES.get(array.dtype, str(array.dtype)), array
    elif hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        name, view = _from_dlpack(field, array)
    else:
        raise UnsupportedError(field, f"{type(array).__name__} is no array and offers no DLPack")
    if name not in ("F32", "F16", "BF16"):
        raise UnsupportedError(field, f"dtype {name}, supported: float32, float16, bfloat16")
    return name, view
