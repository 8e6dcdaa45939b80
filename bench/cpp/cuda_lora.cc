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
#include <map>
#include <tuple>

#include "cuda_bench.h"

namespace loraserve::bench {
namespace {

constexpr int64_t kMixed = 0;
constexpr int kPadded = 128;

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

// What the activations and adapters hold, and what y must be. They are small whole numbers in no
// order, others in each module of each layer, times a factor of the row: an element that is taken
// for its neighbour, in a tile or beyond, makes another sum.
class Numbers {
 public:
  struct Expected {
    float value = 0.0f;
    float tolerance = 0.0f;
  };

  Numbers(const ModuleShapes& shapes, int layers) : shapes_(shapes), layers_(layers) {
    int64_t widest = 0;
    for (const auto& [in, out] : shapes) widest = std::max({widest, in, out});
    const int64_t apart = 2 * kApart * layers * kNumLinearModules;
    for (int64_t i = 0; i < widest * kPadded + apart; ++i) values_.push_back(F32ToBF16(Number(i)));
    for (int layer = 0; layer < layers; ++layer) {
      for (int module = 0; module < kNumLinearModules; ++module) AddSums(layer, module);
    }
  }

  // [kPadded][in] and [kPadded][out]; adapters of lesser ranks take the first rows.
  const uint16_t* A(int layer, int module) const { return values_.data() + AtA(layer, module); }
  const uint16_t* B(int layer, int module) const { return A(layer, module) + kApart; }

  static std::vector<uint16_t> X(int64_t rows, int64_t in) {
    std::vector<uint16_t> x;
    x.reserve(static_cast<size_t>(rows * in));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < in; ++k) x.push_back(F32ToBF16(RowFactor(row) * InputAt(k)));
    }
    return x;
  }
  // Rows so far apart have the same factor.
  static constexpr int64_t kRowFactors = 13;

  // A row of a group's y after all layers, from zeros.
  std::vector<Expected> Row(size_t group, int rank, float scaling, int64_t row) const {
    const float factor = RowFactor(row) * scaling;
    std::vector<Expected> expected;
    for (int m = kModuleGroups[group].first; m < kModuleGroups[group].second; ++m) {
      const size_t begin = expected.size();
      expected.resize(begin + static_cast<size_t>(shapes_[static_cast<size_t>(m)].second));
      for (int layer = 0; layer < layers_; ++layer) {
        const std::vector<Sum>& sums = sums_.at({layer, m, rank});
        for (size_t c = 0; c < sums.size(); ++c) {
          Expected& y = expected[begin + c];
          y.value = BF16ToF32(F32ToBF16(y.value + factor * sums[c].value));
          // h is good to 16 bits, so a sum near the middle of two bfloat16 may become either; two
          // layers that do so are two units of the last of its 8 bits.
          y.tolerance = std::max(y.tolerance,
                                 0x1p-6f * std::abs(y.value) + 0x1p-13f * factor * sums[c].terms);
        }
      }
    }
    return expected;
  }

 private:
  static constexpr int64_t kApart = 8;
  struct Sum {
    float value = 0.0f;
    float terms = 0.0f;  // of their sizes
  };

  // -4 to 4, never 0.
  static float Number(int64_t i) {
    uint64_t bits = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    const auto drawn = static_cast<int>(bits >> 61);
    return static_cast<float>(drawn < 4 ? drawn - 4 : drawn - 3);
  }
  static float InputAt(int64_t k) { return Number(-2 - k); }
  static float RowFactor(int64_t row) { return static_cast<float>(1 + row % kRowFactors); }
  static int64_t AtA(int layer, int module) {
    return 2 * kApart * (int64_t{layer} * kNumLinearModules + module);
  }

  // Of every rank, for a row with factor 1.
  void AddSums(int layer, int module) {
    const auto& [in, out] = shapes_[static_cast<size_t>(module)];
    const uint16_t* const a = A(layer, module);
    const uint16_t* const b = B(layer, module);
    std::vector<Sum> sums(static_cast<size_t>(out));
    for (int64_t r = 0; r < kPadded; ++r) {
      float h = 0.0f;
      for (int64_t k = 0; k < in; ++k) h += InputAt(k) * BF16ToF32(a[r * in + k]);
      for (int64_t c = 0; c < out; ++c) {
        const float term = h * BF16ToF32(b[r * out + c]);
        sums[static_cast<size_t>(c)].value += term;
        sums[static_cast<size_t>(c)].terms += std::abs(term);
      }
      const auto rank = static_cast<int>(r + 1);
      if (std::find(kRanks.begin(), kRanks.end(), rank) != kRanks.end()) {
        sums_[{layer, module, rank}] = sums;
      }
    }
  }

  ModuleShapes shapes_;
  int layers_;
  std::vector<uint16_t> values_;
  std::map<std::tuple<int, int, int>, std::vector<Sum>> sums_;  // [layer, module, rank][column]
};

class LoraBench {
 public:
  LoraBench(Device& device, const Sizes& sizes)
      : device_(device),
        backend_(device.backend()),
        sizes_(sizes),
        numbers_(sizes.shapes, sizes.layers) {
    max_rows_ = std::max(sizes.decode_rows.back(), sizes.prefill_rows.back());
    Install();
    for (const auto& [begin, end] : kModuleGroups) {
      int64_t columns = 0;
      for (int m = begin; m < end; ++m) columns += Shape(m).second;
      const int64_t in = Shape(begin).first;
      inputs_.push_back(device.Upload(Numbers::X(max_rows_, in), max_rows_, in));
      outputs_.push_back(device.Zeros(max_rows_, columns));
    }
  }

  void Run(benchmark::State& state, bool decode) {
    const int64_t rank = state.range(0);
    const int64_t distinct = state.range(1);
    const int64_t rows = state.range(2);
    const Step own = StepOf(rank, distinct, rows, decode);
    const Step padded = StepOf(kPadded, distinct, rows, decode);
    for (int warm = 0; warm < 2; ++warm) Queue(own);  // as it is, then recorded
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
  // Tells most adapters of a step apart, whatever their ranks.
  static float ScalingOf(int rank, int64_t adapter) {
    return static_cast<float>((1 + adapter % 8) * (4 + adapter / 8)) / static_cast<float>(rank);
  }

  const InstalledAdapter& Adapter(int64_t rank, int64_t adapter) const {
    const auto* const found = std::find(kRanks.begin(), kRanks.end(), RankOf(rank, adapter));
    const auto index = static_cast<size_t>(found - kRanks.begin());
    return *adapters_[index * static_cast<size_t>(sizes_.adapters.back()) +
                      static_cast<size_t>(adapter)];
  }

  void Install() {
    std::vector<AdapterSource> sources;
    for (const int rank : kRanks) {
      for (int64_t i = 0; i < sizes_.adapters.back(); ++i) {
        sources.push_back(
            SourceOf(sizes_.shapes, sizes_.layers, rank, ScalingOf(rank, i), nullptr, nullptr));
        for (auto& module : sources.back().modules) {
          module.a.data = numbers_.A(module.layer, static_cast<int>(module.module));
          module.b.data = numbers_.B(module.layer, static_cast<int>(module.module));
        }
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
      for (int32_t row = 0; decode && row < count; ++row) {
        step.sequences.push_back({begin + row, 1, 1, 0});
      }
      if (!decode) step.sequences.push_back({begin, count, count, 0});
    }
    return step;
  }

  double Once(const Step& step) {
    return device_.Seconds([&] { backend_.BeginStep(nullptr, step.inputs()); },
                           [&] { QueueBegun(step); });
  }
  void Queue(const Step& step) {
    backend_.BeginStep(nullptr, step.inputs());
    QueueBegun(step);
  }
  void QueueBegun(const Step& step) {
    backend_.RunStep(nullptr, step.rows, max_rows_, [this](int64_t n) { QueueLayers(n); });
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

  // One run more, from y of zeros: empty if every value is what the numbers make it.
  std::string WhatIsWrong(const Step& step) {
    for (const Memory& y : outputs_) {
      LS_CUDA(cudaMemsetAsync(y.tensor.data, 0,
                              static_cast<uint64_t>(step.rows * y.tensor.stride) * sizeof(uint16_t),
                              backend_.stream()));
    }
    Queue(step);
    for (size_t group = 0; group < kModuleGroups.size(); ++group) {
      const std::vector<uint16_t> y = device_.Download(outputs_[group].Rows(step.rows));
      for (size_t adapter = 0; adapter < step.segments.size(); ++adapter) {
        const LoraSegment& segment = step.segments[adapter];
        const int64_t end = int64_t{segment.row_begin} + segment.row_count;
        const int rank = RankOf(step.rank, static_cast<int64_t>(adapter));
        const float scaling = ScalingOf(rank, static_cast<int64_t>(adapter));
        const int64_t others = std::min(segment.row_begin + Numbers::kRowFactors, end);
        for (int64_t first = segment.row_begin; first < others; ++first) {
          const auto expected = numbers_.Row(group, rank, scaling, first);
          for (int64_t row = first; row < end; row += Numbers::kRowFactors) {
            const std::string wrong =
                WhatDiffers(expected, y.data() + row * static_cast<int64_t>(expected.size()));
            if (wrong.empty()) continue;
            return "group " + std::to_string(group) + ", row " + std::to_string(row) + wrong;
          }
        }
      }
    }
    return "";
  }

  static std::string WhatDiffers(const std::vector<Numbers::Expected>& expected,
                                 const uint16_t* y) {
    for (size_t i = 0; i < expected.size(); ++i) {
      const float found = BF16ToF32(y[i]);
      if (std::abs(found - expected[i].value) <= expected[i].tolerance) continue;  // not so of NaN
      return ", column " + std::to_string(i) + ": " + std::to_string(found) + ", not " +
             std::to_string(expected[i].value);
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
  Numbers numbers_;
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
