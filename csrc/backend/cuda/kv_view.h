// Where keys and values lie on CUDA. A tile is [kv head][block_size][head_dim] in bfloat16.
#pragma once

#include "backend/cuda/platform.h"
#include "backend/cuda/step_header.h"

namespace loraserve {

struct KvView {
  uint8_t* arena = nullptr;
  uint64_t page_bytes = 0;
  uint64_t tile_bytes = 0;
  int32_t tiles_per_page = 0;
  int32_t pages_per_block = 0;
  int32_t block_size = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;

  // The keys or values of one head for the token at `position` of a sequence; the rest of its
  // block's tokens follow.
  __device__ uint16_t* Token(const StepHeader& step, const SequenceSpan& sequence, int32_t layer,
                             bool values, int32_t head, int32_t position) const {
    const int32_t tile = 2 * layer + (values ? 1 : 0);
    const int32_t block = position / block_size;
    const int32_t page = sequence.page_begin + block * pages_per_block + tile / tiles_per_page;
    uint8_t* const at = arena + step.block_pages[page] * page_bytes +
                        static_cast<uint64_t>(tile % tiles_per_page) * tile_bytes;
    const int64_t row = static_cast<int64_t>(head) * block_size + position % block_size;
    return reinterpret_cast<uint16_t*>(at) + row * head_dim;
  }
};

}  // namespace loraserve
