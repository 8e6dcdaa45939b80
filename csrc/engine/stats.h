// Counters and gauges of an engine, a plain value.
#pragma once

#include <cstdint>

namespace loraserve {

struct EngineStats {
  // Since the start.
  uint64_t steps = 0;
  uint64_t prompt_tokens = 0;  // computed in prefill, recomputation included
  uint64_t generated_tokens = 0;
  uint64_t preemptions = 0;
  uint64_t prefix_hit_tokens = 0;
  uint64_t adapter_installs = 0;
  uint64_t adapter_evictions = 0;
  double step_seconds = 0;  // spent in steps
  // Now.
  uint64_t running = 0;
  uint64_t waiting = 0;
  uint64_t page_bytes = 0;
  uint64_t pages_free = 0;
  uint64_t pages_kv = 0;
  uint64_t pages_adapter = 0;
  uint64_t adapters_installed = 0;
  uint64_t adapter_weight_bytes = 0;  // in pages_adapter; the rest of those pages is waste
  uint64_t weight_bytes = 0;
};

}  // namespace loraserve
