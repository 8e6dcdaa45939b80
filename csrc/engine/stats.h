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
  double adapter_install_seconds = 0;  // of those installs, each from its start to its end
  uint64_t adapter_waits = 0;          // requests that came before their adapter was in pages
  double adapter_wait_seconds = 0;     // of theirs, until it was
  double step_seconds = 0;             // spent in steps
  // Now.
  uint64_t running = 0;
  uint64_t waiting = 0;
  uint64_t page_bytes = 0;
  uint64_t pages_free = 0;
  uint64_t pages_kv = 0;
  uint64_t pages_adapter = 0;
  uint64_t adapters_installed = 0;
  uint64_t adapters_installing = 0;  // on their way into pages_adapter
  // Read by installs since the start: by the device from registered host memory, and by a copy
  // more.
  uint64_t adapter_direct_bytes = 0;
  uint64_t adapter_staged_bytes = 0;
  uint64_t adapter_weight_bytes = 0;  // in pages_adapter; the rest of those pages is waste
  uint64_t weight_bytes = 0;
};

}  // namespace loraserve
