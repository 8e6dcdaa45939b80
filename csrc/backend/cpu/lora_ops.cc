// The mixed-rank products of the CPU backend. Work is cut into (segment, target, panels) pieces and
// divided over the threads by rank, never by adapter count: rank 128 is sixteen times rank 8.
#include <algorithm>

#include "backend/cpu/cpu_backend.h"

namespace loraserve {

namespace {

struct Piece {
  const CpuAdapterModule* module = nullptr;
  int32_t row_begin = 0;
  int32_t row_count = 0;
  int64_t column = 0;    // of y
  int64_t h_offset = 0;  // of the segment's [rows][padded rank] in h, floats
  int64_t panels = 0;
  int64_t cost = 0;  // of one panel
};

int64_t PaddedRank(const CpuAdapterModule& module) { return module.a.columns; }

// The pieces in a fixed order, each with its place in h.
template <class Function>
void ForEachPair(std::span<const LoraSegment> segments, std::span<const LoraTarget> targets,
                 Function&& function) {
  int64_t h_offset = 0;
  for (const LoraSegment& segment : segments) {
    if (segment.adapter == nullptr) continue;
    const auto& adapter = static_cast<const CpuAdapter&>(*segment.adapter);
    for (const LoraTarget& target : targets) {
      const CpuAdapterModule* const module = adapter.Find(target.layer, target.module);
      if (module == nullptr) continue;
      function(segment, target, *module, h_offset);
      h_offset += segment.row_count * PaddedRank(*module);
    }
  }
}

// Rows stream through the kernel in groups that share one read of the weights.
int64_t RowCost(int64_t rows) { return std::max<int64_t>(rows, 4); }

// Runs run(piece, panel_begin, panel_end) over all panels, equal cost to each thread.
template <class Run>
void Divide(ThreadPool& pool, const std::vector<Piece>& pieces, int64_t min_cost, Run&& run) {
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.panels * piece.cost;
  const int threads = total < min_cost ? 1 : pool.size();
  const auto part = [&](int worker) {
    const int64_t from = total * worker / threads;
    const int64_t to = total * (worker + 1) / threads;
    int64_t at = 0;
    for (const Piece& piece : pieces) {
      // Panel p belongs to the thread in whose share its start lies.
      const auto first_at_or_after = [&](int64_t cost) {
        return std::clamp<int64_t>((cost - at + piece.cost - 1) / piece.cost, 0, piece.panels);
      };
      const int64_t begin = from <= at ? 0 : first_at_or_after(from);
      const int64_t end = to <= at ? 0 : first_at_or_after(to);
      if (begin < end) run(piece, begin, end);
      at += piece.panels * piece.cost;
    }
  };
  if (threads == 1) return part(0);
  pool.Run(part);
}

constexpr int64_t kParallelCost = 1 << 15;

}  // namespace

void CpuBackend::Lora(Stream*, Tensor x, std::span<const LoraTarget> targets, Tensor y) {
  std::vector<Piece> shrink;
  std::vector<Piece> expand;
  int64_t floats = 0;
  ForEachPair(inputs_.segments, targets,
              [&](const LoraSegment& segment, const LoraTarget& target,
                  const CpuAdapterModule& module, int64_t h_offset) {
                const int64_t rank = PaddedRank(module);
                shrink.push_back({&module, segment.row_begin, segment.row_count, 0, h_offset,
                                  (rank + kPanelWidth - 1) / kPanelWidth,
                                  RowCost(segment.row_count) * module.a.k * kPanelWidth});
                expand.push_back({&module, segment.row_begin, segment.row_count, target.column,
                                  h_offset, module.b.columns / kPanelWidth,
                                  RowCost(segment.row_count) * module.rank * kPanelWidth});
                floats = h_offset + segment.row_count * rank;
              });
  if (shrink.empty()) return;
  if (lora_h_.size() < static_cast<size_t>(floats)) lora_h_.resize(static_cast<size_t>(floats));
  float* const h = lora_h_.data();
  Divide(pool_, shrink, kParallelCost, [&](const Piece& piece, int64_t begin, int64_t end) {
    const int64_t rank = PaddedRank(*piece.module);
    kernels_.paged_gemm({.x = static_cast<const float*>(x.data) + piece.row_begin * x.stride,
                         .x_stride = x.stride,
                         .rows = piece.row_count,
                         .matrix = piece.module->a,
                         .panel_begin = begin,
                         .panel_end = end,
                         .scale = piece.module->scaling,
                         .accumulate = false,
                         .y = h + piece.h_offset,
                         .y_stride = rank,
                         .columns = rank});
  });
  Divide(pool_, expand, kParallelCost, [&](const Piece& piece, int64_t begin, int64_t end) {
    kernels_.paged_gemm(
        {.x = h + piece.h_offset,
         .x_stride = PaddedRank(*piece.module),
         .rows = piece.row_count,
         .matrix = piece.module->b,
         .panel_begin = begin,
         .panel_end = end,
         .scale = 1.0f,
         .accumulate = true,
         .y = static_cast<float*>(y.data) + piece.row_begin * y.stride + piece.column,
         .y_stride = y.stride,
         .columns = piece.module->out_features});
  });
}

}  // namespace loraserve
