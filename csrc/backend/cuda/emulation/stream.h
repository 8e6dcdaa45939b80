// Streams run at once, unless what they are given is recorded for a graph.
#pragma once

#include <functional>

#include "backend/cuda/emulation/cuda_runtime.h"

namespace loraserve::emulation {

// Runs `work` now, or keeps it for the graph that `stream` records.
void Enqueue(cudaStream_t stream, std::function<void()> work);

}  // namespace loraserve::emulation

// From now on there is no device memory left, or there is again. For tests, which find it in the
// library by its name.
extern "C" __attribute__((visibility("default"), used)) void SetEmulatedMemoryFull(bool full);
// Shapes of products planned ahead, and those that a product had to plan itself. Of all backends of
// the library; for tests too.
extern "C" __attribute__((visibility("default"), used)) uint64_t EmulatedGemmPlans();
extern "C" __attribute__((visibility("default"), used)) uint64_t EmulatedLateGemmPlans();
