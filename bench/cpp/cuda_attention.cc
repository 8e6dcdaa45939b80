// Paged attention of one layer with 32 query heads, pages in no order. Arguments of Decode:
// sequences with one row each, tokens of context, head size, KV heads; of Prefill: rows of one
// sequence, the last of its context.
//
// "GB/s" is of the keys and values read, "of_floor" the time that takes at the measured ceiling, by
// the time taken; "TFLOP/s" counts the products of queries that may see keys.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "cuda_bench.h"

namespace loraserve::bench {
namespace {

constexpr int kHeads = kRehearsal ? 4 : 32;
constexpr int64_t kChunk = kRehearsal ? 16 : 1024;  // tokens that are put into the cache at a time

// Every key is the same, so that all weights are; values differ by position and head, and a row's
// result is the mean of those it may see.
float ValueAt(int64_t position, int64_t kv_head) {
  return static_cast<float>(position % 16 + kv_head % 8);
}
double MeanUpTo(int64_t position, int64_t kv_head) {
  const int64_t count = position + 1;
  const int64_t rest = count % 16;
  const int64_t sum = count / 16 * 120 + rest * (rest - 1) / 2;
  return static_cast<double>(sum) / static_cast<double>(count) + static_cast<double>(kv_head % 8);
}

class AttentionBench {
 public:
  // `sequences` of `context` tokens, of each of which the last `rows` are a step's.
  AttentionBench(Device& device, int64_t sequences, int64_t context, int64_t rows, int head_dim,
                 int kv_heads)
      : device_(device), backend_(device.backend()), context_(context) {
    layout_ = LayoutOf(backend_, 1, kHeads, kv_heads, head_dim, 4096);
    const int64_t blocks = (context + layout_.block_size - 1) / layout_.block_size;
    pages_.resize(static_cast<size_t>(sequences * blocks * layout_.pages_per_block));
    std::iota(pages_.begin(), pages_.end(), PageId{0});
    std::shuffle(pages_.begin(), pages_.end(), std::mt19937(1));
    // No rotation: keys stay alike at every position.
    const std::vector<float> frequencies(static_cast<size_t>(head_dim / 2), 0.0f);
    Require(backend_.BindPages(layout_, static_cast<uint32_t>(pages_.size()), frequencies));
    for (int64_t s = 0; s < sequences; ++s) {
      spans_.push_back({static_cast<int32_t>(s * rows), static_cast<int32_t>(rows),
                        static_cast<int32_t>(context),
                        static_cast<int32_t>(s * blocks * layout_.pages_per_block)});
    }
    const int64_t all = sequences * rows;
    MakeQkv(std::max(all, kChunk));
    y_ = device.Zeros(all, int64_t{kHeads} * head_dim);
    Fill();
    positions_.resize(static_cast<size_t>(all));
    for (int64_t i = 0; i < all; ++i) {
      positions_[static_cast<size_t>(i)] = static_cast<int32_t>(context - rows + i % rows);
    }
    backend_.BeginStep(nullptr, {.token_ids = positions_,
                                 .positions = positions_,
                                 .sequences = spans_,
                                 .block_pages = pages_});
  }

  double Once() {
    return device_.Seconds(
        [] {},
        [this] { backend_.PagedAttention(nullptr, 0, qkv_.Rows(y_.tensor.rows), 0, y_.tensor); });
  }

  // After a run: empty if every row is the mean of what it may see.
  std::string WhatIsWrong() {
    const std::vector<uint16_t> y = device_.Download(y_.tensor);
    const int64_t group = kHeads / layout_.num_kv_heads;
    for (size_t i = 0; i < y.size(); ++i) {
      const auto row = static_cast<int64_t>(i) / y_.tensor.cols;
      const int64_t head = static_cast<int64_t>(i) % y_.tensor.cols / layout_.head_dim;
      const double expected = MeanUpTo(positions_[static_cast<size_t>(row)], head / group);
      const double found = static_cast<double>(BF16ToF32(y[i]));
      if (std::abs(found - expected) <= 0.01 + 0.01 * expected) continue;  // not so of NaN
      return "row " + std::to_string(row) + ", head " + std::to_string(head) + ": " +
             std::to_string(found) + ", not " + std::to_string(expected);
    }
    return "";
  }

  double KvBytes() const {
    return static_cast<double>(static_cast<int64_t>(spans_.size()) * context_) * 2.0 * 2.0 *
           static_cast<double>(layout_.num_kv_heads * layout_.head_dim);
  }
  double Flops() const {
    double seen = 0.0;
    for (const int32_t position : positions_) seen += static_cast<double>(position) + 1.0;
    return 4.0 * seen * static_cast<double>(kHeads * layout_.head_dim);
  }

 private:
  // Rows as they stand at positions 0, 1, ... of any chunk.
  void MakeQkv(int64_t rows) {
    const int64_t width = int64_t{kHeads + 2 * layout_.num_kv_heads} * layout_.head_dim;
    std::vector<uint16_t> values(static_cast<size_t>(rows * width));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < width; ++column) {
        const int64_t kv_head = column / layout_.head_dim - kHeads - layout_.num_kv_heads;
        const float value =
            kv_head >= 0 ? ValueAt(row, kv_head) : static_cast<float>(column * 7 % 13 - 6) * 0.125f;
        values[static_cast<size_t>(row * width + column)] = F32ToBF16(value);
      }
    }
    qkv_ = device_.Upload(values, rows, width);
  }

  void Fill() {
    std::vector<int32_t> positions;
    for (const SequenceSpan& span : spans_) {
      for (int64_t begin = 0; begin < context_; begin += kChunk) {
        const int64_t count = std::min(kChunk, context_ - begin);
        positions.assign(static_cast<size_t>(count), 0);
        const SequenceSpan chunk = {0, static_cast<int32_t>(count),
                                    static_cast<int32_t>(begin + count), span.page_begin};
        backend_.BeginStep(nullptr, {.token_ids = positions,
                                     .positions = positions,
                                     .sequences = {&chunk, 1},
                                     .block_pages = pages_});
        backend_.RopeAndStoreKv(nullptr, 0, qkv_.Rows(count));
      }
    }
  }

  Device& device_;
  CudaBackend& backend_;
  KvLayout layout_;
  int64_t context_;
  std::vector<PageId> pages_;
  std::vector<SequenceSpan> spans_;
  std::vector<int32_t> positions_;
  Memory qkv_, y_;
};

void Run(Device& device, benchmark::State& state, bool decode) {
  const int64_t sequences = decode ? state.range(0) : 1;
  const int64_t rows = decode ? 1 : state.range(0);
  AttentionBench bench(device, sequences, state.range(1), rows, static_cast<int>(state.range(2)),
                       static_cast<int>(state.range(3)));
  bench.Once();
  const std::string wrong = bench.WhatIsWrong();
  if (!wrong.empty()) return Fail(state, wrong);
  double taken = 0.0;
  for (auto _ : state) {
    const double seconds = bench.Once();
    state.SetIterationTime(seconds);
    taken += seconds;
  }
  const double mean = taken / static_cast<double>(state.iterations());
  state.counters["GB/s"] = 1e-9 * bench.KvBytes() / mean;
  state.counters["of_floor"] = bench.KvBytes() / device.read_bytes_per_second() / mean;
  state.counters["TFLOP/s"] = 1e-12 * bench.Flops() / mean;
}

void RegisterAll(Device& device) {
  // Head size and KV heads: one for each query head, shared by four, shared and small.
  const std::vector<std::pair<int64_t, int64_t>> heads = {
      {128, kHeads}, {128, kHeads / 4}, {64, kHeads / 4}};
  const std::vector<int64_t> contexts =
      kRehearsal ? std::vector<int64_t>{32, 64} : std::vector<int64_t>{1024, 4096};
  const std::vector<int64_t> batches =
      kRehearsal ? std::vector<int64_t>{3} : std::vector<int64_t>{1, 16, 64};
  for (const bool decode : {true, false}) {
    std::vector<std::vector<int64_t>> cases;
    for (const auto& [head_dim, kv_heads] : heads) {
      for (const int64_t context : contexts) {
        if (!decode) cases.push_back({contexts[0], context, head_dim, kv_heads});
        for (const int64_t batch : batches) {
          if (decode) cases.push_back({batch, context, head_dim, kv_heads});
        }
      }
    }
    Register(decode ? "Decode" : "Prefill",
             {decode ? "sequences" : "rows", "context", "head_dim", "kv_heads"}, cases,
             [&device, decode](benchmark::State& state) { Run(device, state, decode); });
  }
}

}  // namespace
}  // namespace loraserve::bench

int main(int argc, char** argv) {
  return loraserve::bench::Main(argc, argv, loraserve::bench::RegisterAll);
}
