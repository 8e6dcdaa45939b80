// NumPy arrays as the engine's views of host memory.
#pragma once

#include <pybind11/numpy.h>

#include <string>

#include "base/dtype.h"

namespace loraserve {

// A view of a C-contiguous, aligned array of one or two dimensions; uint16 holds the bits of
// bfloat16. The array must outlive it. Throws ValueError for any other array.
inline HostMatrix ViewOf(const pybind11::array& array) {
  if ((array.flags() & pybind11::array::c_style) == 0 || array.ndim() < 1 || array.ndim() > 2) {
    throw pybind11::value_error("array: must be C-contiguous with one or two dimensions");
  }
  HostMatrix view;
  view.data = array.data();
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(array.itemsize()) != 0) {
    throw pybind11::value_error("array: must be aligned to its elements");
  }
  view.rows = array.ndim() == 2 ? array.shape(0) : 1;
  view.cols = array.shape(array.ndim() - 1);
  const char kind = array.dtype().kind();
  const auto size = array.itemsize();
  if (kind == 'f' && size == 4) {
    view.dtype = DType::kF32;
  } else if (kind == 'f' && size == 2) {
    view.dtype = DType::kF16;
  } else if (kind == 'u' && size == 2) {
    view.dtype = DType::kBF16;
  } else {
    throw pybind11::value_error("array: must be float32, float16 or uint16 (bits of bfloat16)");
  }
  return view;
}

inline DType ParseDType(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  throw pybind11::value_error("dtype: '" + name + "' is neither float32 nor bfloat16");
}

}  // namespace loraserve
