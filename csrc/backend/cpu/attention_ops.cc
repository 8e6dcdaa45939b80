// Attention of the CPU backend: a task is one call of the kernel. Where there are fewer tasks than
// threads, as when a few long sequences decode, each span of a task's positions is a call of its
// own and their results are merged after; the bits are the same either way.
#include <algorithm>
#include <cmath>

#include "backend/cpu/cpu_backend.h"

namespace loraserve {

namespace {

// So many tasks for each thread even out what they take.
constexpr int kBusyTasks = 4;

// States kept at a time, floats: those of a step that decodes.
constexpr int64_t kMaxStates = 4 << 20;

// The first position that a query at `position` sees.
int32_t FirstSeen(int32_t position, int window) {
  return window > 0 ? std::max(0, position - window + 1) : 0;
}

int32_t FirstPosition(const SequenceSpan& sequence) {
  return sequence.context_length - sequence.row_count;
}

}  // namespace

std::vector<AttentionTask> CutAttention(const KvLayout& layout,
                                        std::span<const SequenceSpan> sequences, int window,
                                        int threads) {
  const int group = layout.num_heads / layout.num_kv_heads;
  int64_t rows = 0;
  for (const SequenceSpan& sequence : sequences) rows += sequence.row_count;
  const int64_t wanted = int64_t{kBusyTasks} * threads;
  const int64_t fair = (rows * layout.num_kv_heads + wanted - 1) / wanted;
  const auto task_rows =
      static_cast<int32_t>(std::clamp<int64_t>(fair, 1, std::max(1, kMaxQueries / group)));
  const int32_t size = std::min(task_rows * group, kMaxQueries);
  std::vector<AttentionTask> tasks;
  for (const SequenceSpan& sequence : sequences) {
    const int32_t start = FirstPosition(sequence);
    for (int head = 0; head < layout.num_kv_heads; ++head) {
      // The last rows see the most.
      for (int32_t end = sequence.row_count * group; end > 0; end -= size) {
        const int32_t begin = std::max(end - size, 0);
        tasks.push_back({.sequence = &sequence,
                         .head = head,
                         .begin = begin,
                         .end = end,
                         .positions_begin = FirstSeen(start + begin / group, window) /
                                            kAttentionSpan * kAttentionSpan,
                         .positions_end = start + (end - 1) / group + 1});
      }
    }
  }
  return tasks;
}

void CpuBackend::Describe(const AttentionTask& task, Tensor qkv, int window, Tensor y,
                          AttentionCall& call) const {
  const int group = layout_.num_heads / layout_.num_kv_heads;
  const SequenceSpan& sequence = *task.sequence;
  for (int32_t query = task.begin; query < task.end; ++query) {
    const auto i = static_cast<size_t>(query - task.begin);
    const int32_t row = query / group;
    const int64_t column = int64_t{task.head * group + query % group} * layout_.head_dim;
    const auto at = [&](const Tensor& t) {
      return static_cast<float*>(t.data) + (sequence.row_begin + row) * t.stride + column;
    };
    call.queries[i] = at(qkv);
    call.outputs[i] = at(y);
    call.last[i] = FirstPosition(sequence) + row;
    call.first[i] = FirstSeen(call.last[i], window);
  }
  call.scratch.resize(static_cast<size_t>(AttentionScratch(padded_head_dim_)));
  call.args = {.queries = call.queries.data(),
               .first = call.first.data(),
               .last = call.last.data(),
               .outputs = call.outputs.data(),
               .count = task.end - task.begin,
               .head_dim = layout_.head_dim,
               .padded_head_dim = padded_head_dim_,
               .scale = 1.0f / std::sqrt(static_cast<float>(layout_.head_dim)),
               .value_stride = int64_t{layout_.block_size} * 16,
               .scratch = call.scratch.data()};
}

void CpuBackend::FindPanels(const AttentionTask& task, int layer, int32_t begin, int32_t end,
                            AttentionCall& call) const {
  const int each = layout_.block_size / 16;
  const int count = (end - begin + 15) / 16;
  call.keys.resize(static_cast<size_t>(count) + kPanelsAhead);
  call.values.resize(call.keys.size());
  const float* keys = nullptr;
  const float* values = nullptr;
  int block = -1;
  for (int i = 0; i < count; ++i) {
    const int panel = begin / 16 + i;
    if (block != panel / each) {
      block = panel / each;
      keys = BlockTile(*task.sequence, block, layer, false, task.head);
      values = BlockTile(*task.sequence, block, layer, true, task.head);
    }
    const int64_t within = panel % each;
    call.keys[static_cast<size_t>(i)] = keys + within * padded_head_dim_ * 16;
    call.values[static_cast<size_t>(i)] = values + within * 16 * 16;
  }
  for (size_t i = static_cast<size_t>(count); i < call.keys.size(); ++i) {
    call.keys[i] = call.keys[0];
    call.values[i] = call.values[0];
  }
  call.args.key_panels = call.keys.data();
  call.args.value_panels = call.values.data();
  call.args.panels_begin = begin;
}

void CpuBackend::PagedAttention(Stream*, int layer, Tensor qkv, int window, Tensor y) {
  const std::vector<AttentionTask> tasks =
      CutAttention(layout_, inputs_.sequences, window, pool_.size());
  // Spans cost a second pass: only where threads would have nothing to do.
  if (std::ssize(tasks) < pool_.size() && AttentionBySpans(tasks, layer, qkv, window, y)) return;
  pool_.ParallelFor(static_cast<int64_t>(tasks.size()), [&](int64_t index, int worker) {
    const AttentionTask& task = tasks[static_cast<size_t>(index)];
    AttentionCall& call = attention_[static_cast<size_t>(worker)];
    Describe(task, qkv, window, y, call);
    FindPanels(task, layer, task.positions_begin, task.positions_end, call);
    kernels_.attention(call.args);
  });
}

bool CpuBackend::AttentionBySpans(const std::vector<AttentionTask>& tasks, int layer, Tensor qkv,
                                  int window, Tensor y) {
  struct Piece {
    const AttentionTask* task;
    int32_t span;    // its first position
    int64_t states;  // where its states begin
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> task_states;
  int64_t floats = 0;
  for (const AttentionTask& task : tasks) {
    task_states.push_back(floats);
    for (int i = 0; i < task.spans(); ++i) {
      pieces.push_back({&task, task.positions_begin + i * kAttentionSpan, floats});
      floats += (task.end - task.begin) * AttentionState(padded_head_dim_);
    }
  }
  if (pieces.size() == tasks.size() || floats > kMaxStates) return false;
  if (attention_states_.size() < static_cast<size_t>(floats)) {
    attention_states_.resize(static_cast<size_t>(floats));
  }
  pool_.ParallelFor(static_cast<int64_t>(pieces.size()), [&](int64_t index, int worker) {
    const Piece& piece = pieces[static_cast<size_t>(index)];
    AttentionCall& call = attention_[static_cast<size_t>(worker)];
    const int32_t end = std::min(piece.span + kAttentionSpan, piece.task->positions_end);
    Describe(*piece.task, qkv, window, y, call);
    FindPanels(*piece.task, layer, piece.span, end, call);
    kernels_.attention_span(call.args, piece.span, attention_states_.data() + piece.states);
  });
  pool_.ParallelFor(static_cast<int64_t>(tasks.size()), [&](int64_t index, int worker) {
    const AttentionTask& task = tasks[static_cast<size_t>(index)];
    AttentionCall& call = attention_[static_cast<size_t>(worker)];
    Describe(task, qkv, window, y, call);
    kernels_.attention_merge(call.args, task.spans(),
                             attention_states_.data() + task_states[static_cast<size_t>(index)]);
  });
  return true;
}

}  // namespace loraserve
