// Weights of the CPU backend: panels [ceil(N / 16)][K][16] of float32, or of bfloat16 in pairs of
// k-rows, [ceil(N / 16)][ceil(K / 2)][16][2].
#pragma once

#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"

namespace loraserve {

// Memory aligned to a cache line.
class HostBuffer final : public Buffer {
 public:
  static std::unique_ptr<HostBuffer> Create(uint64_t bytes);  // null if there is no memory
  void* data() override { return memory_.get(); }
  const void* data() const { return memory_.get(); }

 private:
  struct Release {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Release> memory_;
};

class CpuWeight final : public PreparedWeight {
 public:
  static Result<std::unique_ptr<CpuWeight>> Create(std::span<const HostMatrix> parts,
                                                   std::vector<float> bias, DType dtype);

  int64_t out_features() const override { return out_features_; }
  int64_t in_features() const override { return in_features_; }
  int64_t bytes() const override {
    return num_panels() * kPanelWidth * KeptRows(in_features_, bfloat16()) * BytesOf(dtype_);
  }
  int64_t num_panels() const { return (out_features_ + 15) / 16; }
  bool bfloat16() const { return dtype_ == DType::kBF16; }
  const void* panels() const { return panels_->data(); }
  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }
  // Copies row `row` of the original matrix to out [in_features].
  void CopyRow(int64_t row, float* out) const;

 private:
  CpuWeight() = default;
  int64_t out_features_ = 0;
  int64_t in_features_ = 0;
  DType dtype_ = DType::kF32;
  std::unique_ptr<HostBuffer> panels_;
  std::vector<float> bias_;  // padded to whole panels
};

}  // namespace loraserve
