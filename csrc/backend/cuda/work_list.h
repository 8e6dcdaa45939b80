// What the LoRA kernels of one step have to do, for all layers.
//
// A segment is cut into runs of at most `token_tile` rows. An entry is one run in one module; its
// work is cut into units, each for one block of threads: first shrink units (16 ranks and a part of
// the inputs, which leave partial sums of h), then expand units (some outputs, which wait for all
// shrink units of their entry). Blocks take units by ticket in the order of the list, where the
// shrink units of a projection group come before its expand units: whoever waits, waits for work
// that somebody has begun.
//
// Ranks may differ between layers. The list is made for the largest rank that a module has in any
// layer; a unit past what its own layer has does nothing.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/cuda/tile_layout.h"

namespace loraserve {

// Modules that share their input: q k v, o, gate up, down.
inline constexpr int kNumLoraGroups = 4;
inline constexpr int kCudaLinearModules = 7;
LS_HOST_DEVICE constexpr int LoraGroupOf(int module) {
  return module < 3 ? 0 : (module == 3 ? 1 : (module < 6 ? 2 : 3));
}

inline constexpr uint32_t kShrinkRanks = 16;      // of a unit
inline constexpr uint32_t kDecodeTokens = 8;      // rows of a run, where all segments are short
inline constexpr uint32_t kPrefillTokens = 32;    // where one is long
inline constexpr uint32_t kDecodeSplitTiles = 4;  // of A in a unit of a short run
inline constexpr uint32_t kExpandRankTiles = 4;   // a unit takes several column tiles below this

struct LoraEntry {
  const DeviceAdapter* adapter = nullptr;
  int32_t row_begin = 0;
  int32_t row_count = 0;
  uint32_t module = 0;
  uint32_t rank_stride = 0;   // of h, floats: the largest rank, rounded up to 16
  uint32_t h_offset = 0;      // of h[split][row][rank_stride], in 16 floats
  uint32_t splits = 0;        // of the inputs
  uint32_t split_tiles = 0;   // column tiles of A in a split
  uint32_t column_tiles = 0;  // of B in an expand unit
  uint32_t shrink_units = 0;
  uint32_t expand_units = 0;
  uint32_t first_shrink = 0;  // in the list
  uint32_t first_expand = 0;
};

// One unit: `entry` and which of its shrink or expand units.
struct LoraUnit {
  uint32_t entry = 0;
  uint32_t part = 0;
};

struct ShrinkPart {
  uint32_t split = 0;
  uint32_t rank_begin = 0;  // kShrinkRanks from here
  uint32_t tile_begin = 0;  // column tiles of A
  uint32_t tile_end = 0;
};
LS_HOST_DEVICE inline ShrinkPart ShrinkPartOf(const LoraEntry& entry, uint32_t part) {
  const uint32_t split = part % entry.splits;
  return {split, part / entry.splits * kShrinkRanks, split * entry.split_tiles,
          (split + 1) * entry.split_tiles};
}

struct ExpandPart {
  uint32_t tile_begin = 0;  // column tiles of B
  uint32_t tile_end = 0;
};
LS_HOST_DEVICE inline ExpandPart ExpandPartOf(const LoraEntry& entry, uint32_t part) {
  return {part * entry.column_tiles, (part + 1) * entry.column_tiles};
}

// A segment of the step and the largest of each module over the layers of its adapter.
struct LoraPlanSegment {
  int32_t row_begin = 0;
  int32_t row_count = 0;
  const DeviceAdapter* adapter = nullptr;
  std::span<const DeviceModule, kCudaLinearModules> largest;
};

struct LoraGroupRange {
  uint32_t first_unit = 0;
  uint32_t shrink_units = 0;
  uint32_t expand_units = 0;
};

struct LoraPlan {
  uint32_t token_tile = kDecodeTokens;
  std::vector<LoraEntry> entries;
  std::array<LoraGroupRange, kNumLoraGroups> groups;
  uint32_t num_units = 0;
  uint64_t h_floats = 0;
};

// Fills `plan`, whose vectors keep their memory.
void PlanLora(std::span<const LoraPlanSegment> segments, LoraPlan& plan);

}  // namespace loraserve
