#include "backend/cpu/prepared_weight.h"

#include <cstring>
#include <limits>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace loraserve {

namespace {
constexpr uint64_t kHugePage = 2 << 20;
}

std::unique_ptr<HostBuffer> HostBuffer::Create(uint64_t bytes) {
  if (bytes > std::numeric_limits<uint64_t>::max() / 2) return nullptr;  // rounding up would wrap
  auto buffer = std::make_unique<HostBuffer>();
  // Large pieces in huge pages where the system gives them: fewer misses of the address cache.
  const uint64_t alignment = bytes >= kHugePage ? kHugePage : 64;
  // One line more than asked for: tiles are read in whole lines.
  const uint64_t rounded = (bytes + 64 + alignment - 1) / alignment * alignment;
  buffer->memory_.reset(std::aligned_alloc(alignment, rounded));
#if defined(__linux__)
  if (alignment == kHugePage && buffer->memory_ != nullptr) {
    madvise(buffer->memory_.get(), rounded, MADV_HUGEPAGE);
  }
#endif
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
      const int64_t start = column / 16 * KeptRows(K, weight->bfloat16()) * 16;
      if (dtype == DType::kBF16) {
        auto* const out = static_cast<uint16_t*>(weight->panels_->data()) + start + column % 16 * 2;
        for (int64_t k = 0; k < K; ++k) out[k / 2 * 32 + k % 2] = F32ToBF16(part.at(row, k));
      } else {
        auto* const out = static_cast<float*>(weight->panels_->data()) + start + column % 16;
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
  const int64_t start = row / 16 * KeptRows(in_features_, bfloat16()) * 16;
  if (bfloat16()) {
    const auto* const in = static_cast<const uint16_t*>(panels_->data()) + start + row % 16 * 2;
    for (int64_t k = 0; k < in_features_; ++k) out[k] = BF16ToF32(in[k / 2 * 32 + k % 2]);
  } else {
    const auto* const in = static_cast<const float*>(panels_->data()) + start + row % 16;
    for (int64_t k = 0; k < in_features_; ++k) out[k] = in[k * 16];
  }
}

}  // namespace loraserve
