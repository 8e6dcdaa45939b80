// How much main memory this process may have.
#pragma once

#include <cstdint>

namespace loraserve {

// Bytes: the machine's memory or the limit of this process's control group, whichever is less.
// UINT64_MAX where neither is known.
uint64_t HostMemoryBytes();

}  // namespace loraserve
