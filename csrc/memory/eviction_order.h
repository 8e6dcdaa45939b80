// In which order what is not in use leaves the pages: cached KV blocks and adapters by one scale.
//
// GreedyDual: a thing is worth a floor, plus what it costs to bring back for each page it takes,
// times a weight of how often it was used. The floor is the worth of what was evicted last, so that
// what nobody uses goes in the end, however dear it is; of two that cost the same, the longest
// unused goes.
#pragma once

#include <algorithm>
#include <bit>
#include <compare>
#include <cstdint>

namespace loraserve {

struct EvictionKey {
  double worth = 0;
  uint64_t last_use = 0;
  auto operator<=>(const EvictionKey&) const = default;
};

class EvictionOrder {
 public:
  // `cost` in seconds for each page; `uses` since it came into its pages, at least 1.
  EvictionKey KeyOf(double cost, uint32_t uses, uint64_t now) const {
    // 1 for a single use, one more for each doubling; no more than 4, or what was asked for all of
    // yesterday would stay for all of today.
    const int weight = std::min(static_cast<int>(std::bit_width(std::max(uses, 1u))), 4);
    return {floor_ + cost * weight, now};
  }
  void Evicted(const EvictionKey& key) { floor_ = std::max(floor_, key.worth); }

 private:
  double floor_ = 0;
};

}  // namespace loraserve
