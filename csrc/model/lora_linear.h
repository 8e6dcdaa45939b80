// A linear layer with the adapters of a mixed batch on top.
#pragma once

#include <memory>
#include <span>

#include "backend/backend.h"

namespace loraserve {

// Device memory that grows to the largest shrink result asked for.
class LoraScratch {
 public:
  // At least `floats` floats, or null if there is no memory.
  void* Reserve(Backend& backend, int64_t floats);

 private:
  std::unique_ptr<Buffer> buffer_;
  int64_t size_ = 0;
};

// y (+)= x W^T (+ bias), then y[:, column] += scaling * (x A^T) B for every segment and target.
void LoraLinear(Backend& backend, Stream* stream, Tensor x, const PreparedWeight& weight,
                bool accumulate, std::span<const LoraSegment> segments,
                std::span<const LoraTarget> targets, LoraScratch& scratch, Tensor y);

}  // namespace loraserve
