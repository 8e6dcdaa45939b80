// What one step did and how long it took: the features of the cost model, for profiling.
#pragma once

#include <cstdint>

namespace loraserve {

// Counts are of tokens unless they say otherwise. Words and meanings as in the StepLoad of
// loraserve/placement/cost_model.py.
struct StepRecord {
  double seconds = 0;
  int64_t prefill_tokens = 0;
  int64_t decode_tokens = 0;
  int64_t context_tokens = 0;  // sum over decoding sequences of their contexts
  double chunk_context = 0;    // sum over prefill chunks of tokens times mean context
  int64_t token_ranks = 0;     // sum over tokens of their adapter's largest rank
  int32_t adapters = 0;        // distinct ones
  int64_t adapter_bytes = 0;   // of the distinct ones, as they lie in pages
  int32_t max_rank = 0;        // of the distinct ones
  int32_t installs = 0;        // adapters being written into pages beside the step
};

}  // namespace loraserve
