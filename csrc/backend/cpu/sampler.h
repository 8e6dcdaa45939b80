// From one row of logits to a token, on the host.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/cpu/kernels.h"
#include "backend/sample_row.h"

namespace loraserve {

// Buffers kept between rows. One per thread.
struct SamplerScratch {
  std::vector<float> logits;
  std::vector<int32_t> counts;  // all zero between rows
  std::vector<int32_t> order;
  std::vector<double> weights;
};

// `logits` [vocab] is read only. A row without a finite logit gives token 0.
SampleResult SampleToken(const CpuKernels& kernels, std::span<const float> logits,
                         const SampleRow& row, SamplerScratch& scratch);

}  // namespace loraserve
