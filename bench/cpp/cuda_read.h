// Reads device memory and does nothing with it: what a device can read at most, and what empties
// its caches of all else without leaving anything to be written back.
#pragma once

#include <cstdint>

#include "backend/cuda/platform.h"

namespace loraserve::bench {

// `bytes` is a multiple of 128. `sink` is one word of device memory.
void ReadThrough(cudaStream_t stream, const void* from, uint64_t bytes, uint32_t* sink,
                 int multiprocessors);

}  // namespace loraserve::bench
