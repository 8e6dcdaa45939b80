// Weights of the CUDA backend: bfloat16 [out, in] row-major, rows 16-byte aligned.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/device_memory.h"

namespace loraserve {

class CudaWeight final : public PreparedWeight {
 public:
  static Result<std::unique_ptr<CudaWeight>> Create(cudaStream_t stream,
                                                    std::span<const HostMatrix> parts,
                                                    std::span<const float> bias);

  int64_t out_features() const override { return out_features_; }
  int64_t in_features() const override { return in_features_; }
  int64_t bytes() const override { return out_features_ * stride_ * 2; }
  int64_t stride() const { return stride_; }
  const uint16_t* data() const { return static_cast<const uint16_t*>(memory_->data()); }
  const float* bias() const {  // in device memory, or null
    return bias_ == nullptr ? nullptr : static_cast<const float*>(bias_->data());
  }

 private:
  int64_t out_features_ = 0;
  int64_t in_features_ = 0;
  int64_t stride_ = 0;
  std::unique_ptr<DeviceBuffer> memory_;
  std::unique_ptr<DeviceBuffer> bias_;
};

// Float32 values in device memory.
Result<std::unique_ptr<DeviceBuffer>> UploadFloats(cudaStream_t stream,
                                                   std::span<const float> values,
                                                   const std::string& what);

}  // namespace loraserve
