#include <cstdlib>
#include <string>

#include "backend/cuda/step_graphs.h"

namespace loraserve {

StepGraphs::StepGraphs() {
  const char* const graphs = std::getenv("LORASERVE_CUDA_GRAPHS");
  enabled_ = graphs == nullptr || std::string(graphs) != "0";
}

void StepGraphs::Run(cudaStream_t stream, int64_t rows, int lora,
                     const std::function<void(int64_t)>& step) {
  if (!enabled_ || rows > kMaxRows) return step(rows);
  Graph& graph = graphs_[{rows, lora}];
  if (!graph.warm) {
    graph.warm = true;
    return step(rows);
  }
  if (graph.exec == nullptr) {
    cudaGraph_t recorded = nullptr;
    LS_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    step(rows);
    LS_CUDA(cudaStreamEndCapture(stream, &recorded));
    LS_CUDA(cudaGraphInstantiate(&graph.exec, recorded, 0));
    LS_CUDA(cudaGraphDestroy(recorded));
  }
  LS_CUDA(cudaGraphLaunch(graph.exec, stream));
}

void StepGraphs::Drop() {
  for (auto& [key, graph] : graphs_) {
    if (graph.exec != nullptr) LS_CUDA(cudaGraphExecDestroy(graph.exec));
  }
  graphs_.clear();
}

}  // namespace loraserve
