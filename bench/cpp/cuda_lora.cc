// A step's LoRA alone, all seven modules of some layers of Llama-2-7B, as the backend runs it.
// Decode: one row for each sequence, by a graph, with the kernel for short runs where no adapter
// has more than eight rows; Prefill: long runs. Arguments: rank (0: 8, 16, 32, 64 and 128 in turn),
// distinct adapters, rows.
//
// "tile_GB/s" is of the distinct adapters' weights at their own ranks; "of_floor" the time that
// reading those takes at the measured ceiling, by the time taken; "of_floor_xy" adds the
// activations. "to_padded" is how many times longer the same adapters take when all have rank 128,
// measured in turn with them.
#include <algorithm>
#include <cmath>

#include "cuda_bench.h"

namespace loraserve::bench {
namespace {

constexpr int64_t kMixed = 0;
constexpr int kPadded = 128;
constexpr float kX = 0.5f;
constexpr float kA = 0x1p-7f;
constexpr float kB = 0x1p-4f;

struct Sizes {
  int layers;
  ModuleShapes shapes;
  uint64_t page_bytes;
  std::vector<int64_t> adapters;
  std::vector<int64_t> decode_rows;
  std::vector<int64_t> prefill_rows;
};

Sizes TheSizes() {
  if (kRehearsal) return {2, ShapesOf(64, 32, 96), 1 << 14, {1, 5}, {1, 5}, {50}};
  return {4, ShapesOf(4096, 4096, 11008), 1 << 17, {1, 4, 16, 64}, {1, 16, 64, 256}, {256, 2048}};
}

class LoraBench {
 public:
  LoraBench(Device& device, const Sizes& sizes)
      : device_(device), backend_(device.backend()), sizes_(sizes) {
    max_rows_ = std::max(sizes.decode_rows.back(), sizes.prefill_rows.back());
    Install();
    for (const auto& [begin, end] : kModuleGroups) {
      int64_t columns = 0;
      for (int m = begin; m < end; ++m) columns += Shape(m).second;
      const int64_t in = Shape(begin).first;
      const std::vector<uint16_t> x(static_cast<size_t>(max_rows_ * in), F32ToBF16(kX));
      inputs_.push_back(device.Upload(x, max_rows_, in));
      outputs_.push_back(device.Zeros(max_rows_, columns));
    }
  }

  void Run(benchmark::State& state, bool decode) {
    const int64_t rank = state.range(0);
    const int64_t distinct = state.range(1);
    const int64_t rows = state.range(2);
    const Step own = StepOf(rank, distinct, rows, decode);
    const Step padded = StepOf(kPadded, distinct, rows, decode);
    for (int warm = 0; warm < 2; ++warm) Once(own);  // as it is, then recorded
    const std::string wrong = WhatIsWrong(own);
    if (!wrong.empty()) return Fail(state, wrong);
    double taken = 0.0;
    double taken_padded = 0.0;
    for (auto _ : state) {
      const double seconds = Once(own);
      state.SetIterationTime(seconds);
      taken += seconds;
      taken_padded += Once(padded);
    }
    double bytes = 0.0;
    for (int64_t i = 0; i < distinct; ++i) {
      bytes += static_cast<double>(Adapter(rank, i).weight_bytes());
    }
    const double mean = taken / static_cast<double>(state.iterations());
    const double ceiling = device_.read_bytes_per_second();
    state.counters["tile_GB/s"] = 1e-9 * bytes / mean;
    state.counters["of_floor"] = bytes / ceiling / mean;
    state.counters["of_floor_xy"] = (bytes + ActivationBytes(rows)) / ceiling / mean;
    state.counters["to_padded"] = taken_padded / taken;
  }

 private:
  struct Step {
    std::vector<int32_t> zeros;
    std::vector<SequenceSpan> sequences;
    std::vector<LoraSegment> segments;
    std::vector<int64_t> adapter_of_row;
    int64_t rank = 0;
    int64_t rows = 0;
    StepInputs inputs() const {
      return {.token_ids = zeros, .positions = zeros, .sequences = sequences, .segments = segments};
    }
  };

  const std::pair<int64_t, int64_t>& Shape(int module) const {
    return sizes_.shapes[static_cast<size_t>(module)];
  }
  static int RankOf(int64_t rank, int64_t adapter) {
    return rank == kMixed ? kRanks[static_cast<size_t>(adapter) % kRanks.size()]
                          : static_cast<int>(rank);
  }
  // Tells the adapters of a step apart, whatever their ranks.
  static float ScaleOf(int64_t adapter) { return static_cast<float>(1 + adapter % 8); }

  const InstalledAdapter& Adapter(int64_t rank, int64_t adapter) const {
    const auto* const found = std::find(kRanks.begin(), kRanks.end(), RankOf(rank, adapter));
    const auto index = static_cast<size_t>(found - kRanks.begin());
    return *adapters_[index * static_cast<size_t>(sizes_.adapters.back()) +
                      static_cast<size_t>(adapter)];
  }

  void Install() {
    int64_t widest = 0;
    for (const auto& [in, out] : sizes_.shapes) widest = std::max({widest, in, out});
    const std::vector<uint16_t> a(static_cast<size_t>(widest * kPadded), F32ToBF16(kA));
    const std::vector<uint16_t> b(static_cast<size_t>(widest * kPadded), F32ToBF16(kB));
    std::vector<AdapterSource> sources;
    for (const int rank : kRanks) {
      for (int64_t i = 0; i < sizes_.adapters.back(); ++i) {
        const float scaling = ScaleOf(i) / static_cast<float>(rank);
        sources.push_back(
            SourceOf(sizes_.shapes, sizes_.layers, rank, scaling, a.data(), b.data()));
      }
    }
    const KvLayout layout = LayoutOf(backend_, 1, 1, 1, 16, sizes_.page_bytes);
    const std::vector<float> frequencies(8, 1.0f);
    // Once for the page size, which says how many pages the adapters take.
    Require(backend_.BindPages(layout, 1, frequencies));
    const auto pages = static_cast<uint32_t>(PagesOf(backend_, sources));
    Require(backend_.BindPages(layout, pages, frequencies));
    adapters_ = InstallAll(backend_, sources, 0);
  }

  // Rows side by side for each adapter, as many as they come to.
  Step StepOf(int64_t rank, int64_t distinct, int64_t rows, bool decode) const {
    Step step{.zeros = std::vector<int32_t>(static_cast<size_t>(rows)), .rank = rank, .rows = rows};
    for (int64_t i = 0; i < distinct; ++i) {
      const auto begin = static_cast<int32_t>(i * rows / distinct);
      const auto count = static_cast<int32_t>((i + 1) * rows / distinct) - begin;
      step.segments.push_back({begin, count, &Adapter(rank, i)});
      step.adapter_of_row.insert(step.adapter_of_row.end(), static_cast<size_t>(count), i);
      for (int32_t row = 0; decode && row < count; ++row) {
        step.sequences.push_back({begin + row, 1, 1, 0});
      }
      if (!decode) step.sequences.push_back({begin, count, count, 0});
    }
    return step;
  }

  double Once(const Step& step) {
    return device_.Seconds([&] { backend_.BeginStep(nullptr, step.inputs()); },
                           [&] {
                             backend_.RunStep(nullptr, step.rows, max_rows_,
                                              [this](int64_t n) { QueueLayers(n); });
                           });
  }

  void QueueLayers(int64_t rows) {
    std::vector<LoraTarget> targets;
    for (int layer = 0; layer < sizes_.layers; ++layer) {
      for (size_t group = 0; group < kModuleGroups.size(); ++group) {
        targets.clear();
        int64_t column = 0;
        for (int m = kModuleGroups[group].first; m < kModuleGroups[group].second; ++m) {
          targets.push_back({layer, static_cast<LinearModule>(m), column});
          column += Shape(m).second;
        }
        backend_.Lora(nullptr, inputs_[group].Rows(rows), targets, outputs_[group].Rows(rows));
      }
    }
  }

  // One run more, from y of zeros: empty if every value is what the ranks and scalings make it.
  std::string WhatIsWrong(const Step& step) {
    for (const Memory& y : outputs_) {
      LS_CUDA(cudaMemsetAsync(y.tensor.data, 0,
                              static_cast<uint64_t>(step.rows * y.tensor.stride) * sizeof(uint16_t),
                              backend_.stream()));
    }
    Once(step);
    for (size_t group = 0; group < kModuleGroups.size(); ++group) {
      const std::vector<uint16_t> y = device_.Download(outputs_[group].Rows(step.rows));
      const auto columns = static_cast<size_t>(outputs_[group].tensor.cols);
      const auto in = static_cast<float>(Shape(kModuleGroups[group].first).first);
      for (size_t i = 0; i < y.size(); ++i) {
        const float scale = ScaleOf(step.adapter_of_row[i / columns]);
        const float expected = scale * in * kX * kA * kB * static_cast<float>(sizes_.layers);
        // Each layer adds to a bfloat16.
        const float error = std::abs(BF16ToF32(y[i]) - expected);
        if (error <= 0.02f * expected) continue;  // not so of NaN
        return "group " + std::to_string(group) + ", row " + std::to_string(i / columns) +
               ", column " + std::to_string(i % columns) + ": " + std::to_string(BF16ToF32(y[i])) +
               ", not " + std::to_string(expected);
      }
    }
    return "";
  }

  // x read once for each group, y read and written.
  double ActivationBytes(int64_t rows) const {
    int64_t values = 0;
    for (size_t group = 0; group < kModuleGroups.size(); ++group) {
      values += inputs_[group].tensor.cols + 2 * outputs_[group].tensor.cols;
    }
    return static_cast<double>(2 * rows * values * sizes_.layers);
  }

  Device& device_;
  CudaBackend& backend_;
  Sizes sizes_;
  int64_t max_rows_ = 0;
  std::vector<std::unique_ptr<InstalledAdapter>> adapters_;  // [rank][adapter]
  std::vector<Memory> inputs_, outputs_;                     // of each group
};

void RegisterAll(Device& device) {
  const Sizes sizes = TheSizes();
  const auto bench = std::make_shared<LoraBench>(device, sizes);
  for (const bool decode : {true, false}) {
    std::vector<std::vector<int64_t>> cases;
    for (const int64_t rows : decode ? sizes.decode_rows : sizes.prefill_rows) {
      for (const int64_t adapters : sizes.adapters) {
        // Runs of a prefill are longer than what the kernel for short ones takes.
        if (adapters > rows || (!decode && rows / adapters <= int64_t{kDecodeTokens})) continue;
        for (const int rank : kRanks) cases.push_back({rank, adapters, rows});
        if (adapters > 1) cases.push_back({kMixed, adapters, rows});
      }
    }
    Register(decode ? "Decode" : "Prefill", {"rank", "adapters", "rows"}, cases,
             [bench, decode](benchmark::State& state) { bench->Run(state, decode); });
  }
}

}  // namespace
}  // namespace loraserve::bench

int main(int argc, char** argv) {
  return loraserve::bench::Main(argc, argv, loraserve::bench::RegisterAll);
}
