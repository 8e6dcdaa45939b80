// Steps recorded once and launched as graphs: a decode step is dozens of launches, which take the
// host longer than they take the device.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "backend/cuda/platform.h"

namespace loraserve {

// Of one stream. A graph holds addresses: it serves as long as nothing it reads has moved.
class StepGraphs {
 public:
  // None are made if the environment has LORASERVE_CUDA_GRAPHS=0.
  StepGraphs();
  ~StepGraphs() { Drop(); }
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  // Queues what `step` queues for so many rows, by a graph from the third such step on; the second
  // is recorded. Steps of as many rows with the same `lora` queue the same launches. Steps of more
  // than kMaxRows are left as they are.
  void Run(cudaStream_t stream, int64_t rows, int lora, const std::function<void(int64_t)>& step);
  // Forgets all; none may be under way.
  void Drop();

 private:
  static constexpr int64_t kMaxRows = 512;
  struct Graph {
    bool warm = false;  // ran once without being recorded: whatever loads at first use is loaded
    cudaGraphExec_t exec = nullptr;
  };

  bool enabled_;
  std::map<std::pair<int64_t, int>, Graph> graphs_;  // by rows and `lora`
};

}  // namespace loraserve
