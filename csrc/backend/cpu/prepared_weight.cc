#include "backend/cpu/prepared_weight.h"

#include <cstring>
#include <limits>
#include <string>

namespace loraserve {

std::unique_ptr<HostBuffer> HostBuffer::Create(uint64_t bytes) {
  if (bytes > std::numeric_limits<uint64_t>::max() / 2) return nullptr;  // rounding up would wrap
  auto buffer = std::make_unique<HostBuffer>();
  buffer->memory_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
  return buffer->memory_ == nullptr ? nullptr : std::move(buffer);
}

Result<std::unique_ptr<CpuWeight>> CpuWeight::Create(std::span<const HostMatrix> parts,
                                                     std::vector<float> bias, DType dtype) {
  if (dtype == DType::kF16) {
    return Status(StatusCode::kInvalidArgument, "weight_dtype: float16 is kept as float32 here");
  }
  std::unique_ptr<CpuWeight> weight(new CpuWeight);
  weight->in_features_ = parts.front().cols;
  weight->dtype_ = dtype;
  for (const HostMatrix& part : parts) weight->out_features_ += part.rows;
  const int64_t K = weight->in_features_;
  weight->panels_ = HostBuffer::Create(static_cast<uint64_t>(weight->bytes()));
  if (weight->panels_ == nullptr) {
    return Status(StatusCode::kResourceExhausted,
                  "memory: " + std::to_string(weight->bytes()) + " bytes for a weight");
  }
  std::memset(weight->panels_->data(), 0, static_cast<size_t>(weight->bytes()));
  int64_t column = 0;
  for (const HostMatrix& part : parts) {
    for (int64_t row = 0; row < part.rows; ++row, ++column) {
      const int64_t start = column / 16 * K * 16 + column % 16;
      if (dtype == DType::kBF16) {
        auto* const out = static_cast<uint16_t*>(weight->panels_->data()) + start;
        for (int64_t k = 0; k < K; ++k) out[k * 16] = F32ToBF16(part.at(row, k));
      } else {
        auto* const out = static_cast<float*>(weight->panels_->data()) + start;
        for (int64_t k = 0; k < K; ++k) out[k * 16] = part.at(row, k);
      }
    }
  }
  weight->bias_ = std::move(bias);
  if (!weight->bias_.empty()) {
    weight->bias_.resize(static_cast<size_t>(weight->num_panels() * 16), 0.0f);
  }
  return weight;
}

void CpuWeight::CopyRow(int64_t row, float* out) const {
  const int64_t start = row / 16 * in_features_ * 16 + row % 16;
  if (bfloat16()) {
    const auto* const in = static_cast<const uint16_t*>(panels_->data()) + start;
    for (int64_t k = 0; k < in_features_; ++k) out[k] = BF16ToF32(in[k * 16]);
  } else {
    const auto* const in = static_cast<const float*>(panels_->data()) + start;
    for (int64_t k = 0; k < in_features_; ++k) out[k] = in[k * 16];
  }
}

}  // namespace loraserve
