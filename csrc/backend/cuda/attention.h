// Causal attention over paged keys and values, by the tensor cores' m16n8k16 products.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/kv_view.h"

namespace loraserve {

inline constexpr int kMaxHeadDim = 128;
inline constexpr int kAttentionTileRows = 64;  // rows of a prefill tile times query heads

// Positions of a prefill tile where `group` query heads share a KV head.
inline int AttentionTilePositions(int group) {
  return group >= kAttentionTileRows ? 1 : kAttentionTileRows / group;
}

// Floats of `partial` that RunDecodeAttention may want on a device.
uint64_t AttentionScratchFloats(int multiprocessors);

// Once, at start.
void PrepareDecodeAttention();
void PreparePrefillAttention();

// Rows of sequences that have one row in this step; the others are left alone. Long contexts are
// split over blocks, and the parts put together in their order.
void RunDecodeAttention(cudaStream_t stream, const StepHeader* step, const KvView& kv, int layer,
                        int window, int multiprocessors, float* partial, Tensor qkv, Tensor y);
// The step's attention tiles.
void RunPrefillAttention(cudaStream_t stream, const StepHeader* step, const KvView& kv, int layer,
                         int window, int num_tiles, Tensor qkv, Tensor y);

}  // namespace loraserve
