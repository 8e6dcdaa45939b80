#include "backend/cuda/work_list.h"

#include <algorithm>
#include <numeric>

namespace loraserve {

namespace {

// Sizes the entry's units; where they begin is set once all are known.
LoraEntry MakeEntry(const LoraPlanSegment& segment, uint32_t module, int32_t row_begin,
                    int32_t row_count, uint32_t token_tile) {
  const DeviceModule& m = segment.largest[module];
  LoraEntry entry{
      .adapter = segment.adapter, .row_begin = row_begin, .row_count = row_count, .module = module};
  const uint32_t rank_blocks = CeilDiv(m.rank, kShrinkRanks);
  entry.rank_stride = rank_blocks * kShrinkRanks;
  // Short runs are bound by the bytes of A, which many blocks read faster. Long runs have blocks
  // enough, and splits would multiply what the expand units read of h.
  entry.split_tiles = token_tile == kDecodeTokens ? kDecodeSplitTiles : m.in_tiles();
  entry.splits = CeilDiv(m.in_tiles(), entry.split_tiles);
  entry.shrink_units = rank_blocks * entry.splits;
  entry.column_tiles = std::max(1u, kExpandRankTiles / m.rank_tiles());
  entry.expand_units = CeilDiv(m.out_tiles(), entry.column_tiles);
  return entry;
}

}  // namespace

void PlanLora(std::span<const LoraPlanSegment> segments, LoraPlan& plan) {
  plan.entries.clear();
  plan.num_units = 0;
  plan.h_floats = 0;
  int32_t longest = 0;
  for (const LoraPlanSegment& segment : segments) longest = std::max(longest, segment.row_count);
  plan.token_tile = longest <= static_cast<int32_t>(kDecodeTokens) ? kDecodeTokens : kPrefillTokens;
  // The costliest first, so that no block begins one when the others are done.
  std::vector<uint32_t> order(segments.size());
  std::iota(order.begin(), order.end(), 0);
  std::array<LoraGroupRange, kNumLoraGroups> groups{};
  for (uint32_t module = 0; module < kCudaLinearModules; ++module) {
    LoraGroupRange& group = groups[static_cast<size_t>(LoraGroupOf(static_cast<int>(module)))];
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
      return segments[a].largest[module].rank > segments[b].largest[module].rank;
    });
    for (const uint32_t index : order) {
      const LoraPlanSegment& segment = segments[index];
      if (segment.largest[module].rank == 0) continue;
      const auto tile = static_cast<int32_t>(plan.token_tile);
      for (int32_t row = 0; row < segment.row_count; row += tile) {
        LoraEntry entry = MakeEntry(segment, module, segment.row_begin + row,
                                    std::min(tile, segment.row_count - row), plan.token_tile);
        entry.h_offset = static_cast<uint32_t>(plan.h_floats / 16);
        plan.h_floats +=
            uint64_t{entry.splits} * static_cast<uint32_t>(entry.row_count) * entry.rank_stride;
        entry.first_shrink = group.shrink_units;  // within its kind for now
        entry.first_expand = group.expand_units;
        group.shrink_units += entry.shrink_units;
        group.expand_units += entry.expand_units;
        plan.entries.push_back(entry);
      }
    }
  }
  for (LoraGroupRange& group : groups) {
    group.first_unit = plan.num_units;
    plan.num_units += group.shrink_units + group.expand_units;
  }
  for (LoraEntry& entry : plan.entries) {
    const auto index = static_cast<size_t>(LoraGroupOf(static_cast<int>(entry.module)));
    const LoraGroupRange& group = groups[index];
    entry.first_shrink += group.first_unit;
    entry.first_expand += group.first_unit + group.shrink_units;
  }
  plan.groups = groups;
}

}  // namespace loraserve
