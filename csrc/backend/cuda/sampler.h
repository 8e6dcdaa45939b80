// Sampling on the device: one block for each row of logits.
//
// Every choice is made in integers (weights are 40-bit fixed point), so a row's token is a function
// of the row alone, whatever the order in which its threads come.
#pragma once

#include <memory>
#include <span>

#include "backend/backend.h"
#include "backend/cuda/device_memory.h"

namespace loraserve {

class CudaSampler {
 public:
  CudaSampler() = default;
  ~CudaSampler();
  CudaSampler(const CudaSampler&) = delete;
  CudaSampler& operator=(const CudaSampler&) = delete;

  // As Backend::Sample.
  void Sample(cudaStream_t stream, Tensor logits, std::span<const SampleRow> rows,
              std::span<SampleResult> results);

 private:
  StagedTable table_;
  ScratchBuffer keys_;
  ScratchBuffer counts_;
  ScratchBuffer out_;
  std::byte* host_out_ = nullptr;  // pinned
  uint64_t host_out_bytes_ = 0;
};

}  // namespace loraserve
