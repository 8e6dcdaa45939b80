// Tokens of a step grouped into runs that share an adapter.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "lora/residency.h"

namespace loraserve {

struct AdapterRun {
  AdapterId adapter = 0;
  int32_t row_begin = 0;
  int32_t row_count = 0;
};

// `counts[i]` consecutive rows use adapters[i]; neighbours of one adapter become one run. Runs of
// the base model are left out.
std::vector<AdapterRun> GroupByAdapter(std::span<const AdapterId> adapters,
                                       std::span<const int32_t> counts);

}  // namespace loraserve
