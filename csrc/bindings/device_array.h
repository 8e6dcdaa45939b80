// NumPy arrays in a backend's memory and back, for tests.
#pragma once

#include <pybind11/numpy.h>

#include <cmath>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "bindings/raise.h"

namespace loraserve {

using FloatArray = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;

struct Activation {
  std::shared_ptr<Buffer> buffer;
  Tensor tensor;
};

class DeviceArrays {
 public:
  // `backend` outlives this.
  explicit DeviceArrays(Backend* backend) : backend_(backend) {}

  // Everything starts as NaN: what an operation should not read would show.
  Activation Empty(int64_t rows, int64_t cols) {
    const int64_t stride = backend_->RowStride(cols);
    const FloatArray none(std::vector<pybind11::ssize_t>{rows, 0});
    return Fill(none, rows, cols, stride);
  }

  Activation Upload(const FloatArray& array) {
    return Fill(array, array.shape(0), array.shape(1), backend_->RowStride(array.shape(1)));
  }

  FloatArray Download(const Activation& from) {
    const Tensor& t = from.tensor;
    const bool f32 = backend_->activation_dtype() == DType::kF32;
    const auto count = static_cast<size_t>(t.rows * t.stride);
    std::vector<uint8_t> host(count * (f32 ? sizeof(float) : sizeof(uint16_t)));
    backend_->CopyToHost(nullptr, t.data, host.data(), host.size());
    backend_->Synchronize(nullptr);
    const HostMatrix matrix{host.data(), f32 ? DType::kF32 : DType::kBF16, t.rows, t.stride};
    FloatArray out({t.rows, t.cols});
    for (int64_t row = 0; row < t.rows; ++row) {
      for (int64_t col = 0; col < t.cols; ++col) out.mutable_at(row, col) = matrix.at(row, col);
    }
    return out;
  }

 private:
  Activation Fill(const FloatArray& array, int64_t rows, int64_t cols, int64_t stride) {
    const bool f32 = backend_->activation_dtype() == DType::kF32;
    const auto count = static_cast<size_t>(rows * stride);
    std::vector<float> floats(count, NAN);
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(array.data() + row * array.shape(1), array.shape(1),
                  floats.begin() + row * stride);
    }
    std::vector<uint16_t> halves;
    if (!f32) {
      for (const float value : floats) halves.push_back(F32ToBF16(value));
    }
    const void* const host = f32 ? static_cast<const void*>(floats.data()) : halves.data();
    const uint64_t bytes = count * (f32 ? sizeof(float) : sizeof(uint16_t));
    std::shared_ptr<Buffer> buffer = Unwrap(backend_->Allocate(bytes));
    backend_->CopyToDevice(nullptr, host, buffer->data(), bytes);
    backend_->Synchronize(nullptr);
    return {buffer, {buffer->data(), rows, cols, stride}};
  }

  Backend* backend_;
};

}  // namespace loraserve
