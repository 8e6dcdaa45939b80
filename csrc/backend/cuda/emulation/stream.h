// Streams run at once, unless what they are given is recorded for a graph.
#pragma once

#include <functional>

#include "backend/cuda/emulation/cuda_runtime.h"

namespace loraserve::emulation {

// Runs `work` now, or keeps it for the graph that `stream` records.
void Enqueue(cudaStream_t stream, std::function<void()> work);

}  // namespace loraserve::emulation
