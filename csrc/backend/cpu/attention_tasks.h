// How the CPU backend cuts attention into calls of its kernel.
#pragma once

#include <array>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"

namespace loraserve {

// Queries of one sequence and KV head that share a pass over its keys and values. They are numbered
// row by row: row * (query heads of a KV head) + head.
struct AttentionTask {
  const SequenceSpan* sequence = nullptr;
  int head = 0;
  int32_t begin = 0, end = 0;  // queries
  // What they see lies within [positions_begin, positions_end); the first is a multiple of
  // kAttentionSpan.
  int32_t positions_begin = 0, positions_end = 0;

  int spans() const {
    return (positions_end - positions_begin + kAttentionSpan - 1) / kAttentionSpan;
  }
};

// All tasks of a step, of each sequence those that take longest first. More threads, fewer queries
// in each.
std::vector<AttentionTask> CutAttention(const KvLayout& layout,
                                        std::span<const SequenceSpan> sequences, int window,
                                        int threads);

// The arrays of one call, kept from call to call.
struct AttentionCall {
  AttentionArgs args;
  std::array<const float*, kMaxQueries> queries;
  std::array<float*, kMaxQueries> outputs;
  std::array<int32_t, kMaxQueries> first, last;
  std::vector<const float*> keys, values;
  std::vector<float> scratch;
};

}  // namespace loraserve
