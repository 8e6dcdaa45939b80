#include "lora/adapter_batch.h"

namespace loraserve {

std::vector<AdapterRun> GroupByAdapter(std::span<const AdapterId> adapters,
                                       std::span<const int32_t> counts) {
  std::vector<AdapterRun> runs;
  int32_t row = 0;
  for (size_t i = 0; i < adapters.size(); ++i) {
    if (adapters[i] != 0) {
      const bool joins = !runs.empty() && runs.back().adapter == adapters[i] &&
                         runs.back().row_begin + runs.back().row_count == row;
      if (!joins) runs.push_back({adapters[i], row, 0});
      runs.back().row_count += counts[i];
    }
    row += counts[i];
  }
  return runs;
}

}  // namespace loraserve
