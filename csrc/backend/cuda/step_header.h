// What the kernels of a step read, in device memory. The header never moves, and all else is found
// through it: a graph that was recorded once serves every later step.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/cuda/work_list.h"

namespace loraserve {

// A run of rows of one sequence whose attention one block computes for one KV head.
struct AttentionTile {
  int32_t sequence = 0;
  int32_t row_begin = 0;  // within the sequence's rows of this step
};

struct StepHeader {
  int32_t num_entries = 0;
  int32_t num_lora_layers = 0;
  int32_t num_attention_tiles = 0;
  LoraGroupRange groups[kNumLoraGroups];
  // Rows are padded to what the step runs with: there row_sequence is -1 and the rest 0.
  const int32_t* token_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* row_sequence = nullptr;
  const SequenceSpan* sequences = nullptr;
  const PageId* block_pages = nullptr;
  const AttentionTile* attention_tiles = nullptr;  // of sequences with more than one row
  const LoraEntry* entries = nullptr;
  LoraUnit* units = nullptr;
  uint32_t* ready = nullptr;    // [lora layer][entry]: shrink units done
  uint32_t* tickets = nullptr;  // [lora layer][group]: units taken
  float* h = nullptr;
};

}  // namespace loraserve
