#include "model/lora_linear.h"

#include <algorithm>

#include "base/check.h"

namespace loraserve {

void* LoraScratch::Reserve(Backend& backend, int64_t floats) {
  if (floats > size_) {
    const int64_t size = std::max(floats, 2 * size_);
    auto buffer = backend.Allocate(static_cast<uint64_t>(size) * sizeof(float));
    if (!buffer.ok()) return nullptr;
    buffer_ = std::move(buffer.value());
    size_ = size;
  }
  return buffer_->data();
}

void LoraLinear(Backend& backend, Stream* stream, Tensor x, const PreparedWeight& weight,
                bool accumulate, std::span<const LoraSegment> segments,
                std::span<const LoraTarget> targets, LoraScratch& scratch, Tensor y) {
  backend.Gemm(stream, x, weight, accumulate, y);
  if (segments.empty()) return;
  const int64_t floats = backend.LoraScratch(segments, targets);
  if (floats == 0) return;
  void* const h = scratch.Reserve(backend, floats);
  LS_CHECK(h != nullptr);
  backend.LoraShrink(stream, x, segments, targets, h);
  backend.LoraExpand(stream, h, segments, targets, y);
}

}  // namespace loraserve
