// The scheduler's answer: what one step computes. A plain value.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/sequence.h"

namespace loraserve {

// Done in order before the step: an eviction may give its pages to a later installation. An
// installation begins here and goes on beside this step and later ones; see installer.h.
struct AdapterChange {
  AdapterId adapter = 0;
  bool install = false;  // else evict
  std::vector<PageId> pages;
};

// Positions [begin, begin + count) of a sequence. `samples` if the last one yields a token.
struct StepItem {
  Sequence* sequence = nullptr;
  int32_t begin = 0;
  int32_t count = 0;
  bool samples = false;
};

struct StepBatch {
  std::vector<AdapterChange> changes;
  std::vector<StepItem> items;
  int32_t num_tokens = 0;
};

}  // namespace loraserve
