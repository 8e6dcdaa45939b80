// A whole step of some layers of Llama-2-7B and its logits, as the engine asks the backend for it:
// no scheduler, no sampling. Arguments: rows (Decode: sequences of 1k of context; Prefill: of one
// prompt) and adapters (0: none; 1: one of rank 128 for all; 2: one for each sequence, of ranks 8
// to 128 in turn).
//
// "of_floor" of Decode is the time that reading weights, keys and values and the distinct adapters
// takes at the measured ceiling, by the time taken; "TFLOP/s" of Prefill is of the linear layers.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cuda_bench.h"
#include "model/llama.h"

namespace loraserve::bench {
namespace {

enum Adapters : int64_t { kNone, kShared, kMixed };

constexpr int64_t kContext = kRehearsal ? 32 : 1024;
constexpr int32_t kLargestRank = kRanks.back();
constexpr int64_t kMostSequences = kRehearsal ? 3 : 64;
constexpr uint64_t kPageBytes = kRehearsal ? 1 << 14 : 1 << 17;

ModelConfig TheModel() {
  ModelConfig config{.vocab_size = kRehearsal ? 128 : 32000,
                     .hidden_size = kRehearsal ? 64 : 4096,
                     .num_layers = kRehearsal ? 2 : 4,
                     .num_heads = kRehearsal ? 4 : 32,
                     .num_kv_heads = kRehearsal ? 2 : 32,
                     .head_dim = kRehearsal ? 16 : 128,
                     .intermediate_size = kRehearsal ? 96 : 11008,
                     .max_position = 4096};
  for (int32_t i = 0; i < config.head_dim / 2; ++i) {
    config.inverse_frequencies.push_back(
        std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(config.head_dim)));
  }
  config.windows.assign(static_cast<size_t>(config.num_layers), 0);
  return config;
}

// Values of about 0.02 in size.
std::vector<uint16_t> RandomValues(int64_t count) {
  std::vector<uint16_t> values(static_cast<size_t>(count));
  uint64_t state = 88172645463325252u;
  for (uint16_t& value : values) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    value = F32ToBF16((static_cast<float>(state >> 40) * 0x1p-24f - 0.5f) * 0.07f);
  }
  return values;
}

class StepBench {
 public:
  explicit StepBench(Device& device)
      : device_(device), backend_(device.backend()), config_(TheModel()) {
    const int64_t widest = std::max(config_.vocab_size, config_.intermediate_size);
    // Enough for the largest weight, and for an adapter's matrices wherever they begin.
    const int64_t most = widest * std::max(config_.hidden_size, kLargestRank);
    const std::vector<uint16_t> values = RandomValues(most + 16 * kMostSequences);
    Bind(values);
    MakeModel(values);
    for (int64_t s = 0; s < kMostSequences; ++s) {
      Queue(StepOf(kContext, kNone, s));
      backend_.Synchronize(nullptr);
    }
  }

  void Run(benchmark::State& state, bool decode) {
    const int64_t rows = state.range(0);
    const auto adapters = static_cast<Adapters>(state.range(1));
    const Step step = decode ? StepOf(rows, adapters) : StepOf(rows, adapters, 0);
    const std::string wrong = WhatIsWrong(step);
    if (!wrong.empty()) return Fail(state, wrong);
    double taken = 0.0;
    for (auto _ : state) {
      const double seconds = Once(step);
      state.SetIterationTime(seconds);
      taken += seconds;
    }
    const double mean = taken / static_cast<double>(state.iterations());
    state.counters["tokens/s"] = static_cast<double>(rows) / mean;
    if (decode) {
      state.counters["of_floor"] = NeededBytes(step) / device_.read_bytes_per_second() / mean;
    } else {
      const double linear = LayerWeightBytes() / 2.0;
      state.counters["TFLOP/s"] = 2e-12 * linear * static_cast<double>(rows) / mean;
    }
  }

 private:
  struct Step {
    std::vector<int32_t> tokens, positions, logit_rows;
    std::vector<SequenceSpan> sequences;
    std::vector<LoraSegment> segments;
    StepInputs inputs(std::span<const PageId> pages) const {
      return {tokens, positions, sequences, pages, segments};
    }
  };

  // Pages for every sequence's context and a token more, then for the adapters: those of mixed
  // ranks, and one of rank 128.
  void Bind(const std::vector<uint16_t>& values) {
    const ModuleShapes shapes =
        ShapesOf(config_.hidden_size, config_.kv_size(), config_.intermediate_size);
    std::vector<AdapterSource> sources;
    for (int64_t i = 0; i <= kMostSequences; ++i) {
      const int rank =
          i == kMostSequences ? kLargestRank : kRanks[static_cast<size_t>(i) % kRanks.size()];
      sources.push_back(SourceOf(shapes, config_.num_layers, rank, 1.0f, values.data() + 8 * i,
                                 values.data() + 16 * i));
    }
    layout_ = LayoutOf(backend_, config_.num_layers, config_.num_heads, config_.num_kv_heads,
                       config_.head_dim, kPageBytes);
    Require(backend_.BindPages(layout_, 1, config_.inverse_frequencies));
    blocks_ = (kContext + 1 + layout_.block_size - 1) / layout_.block_size;
    pages_.resize(static_cast<size_t>(kMostSequences * blocks_ * layout_.pages_per_block));
    std::iota(pages_.begin(), pages_.end(), PageId{0});
    const auto kv_pages = static_cast<uint32_t>(pages_.size());
    const uint64_t all = kv_pages + PagesOf(backend_, sources);
    Require(backend_.BindPages(layout_, static_cast<uint32_t>(all), config_.inverse_frequencies));
    adapters_ = InstallAll(backend_, sources, kv_pages);
  }

  void MakeModel(const std::vector<uint16_t>& values) {
    const std::vector<float> ones(static_cast<size_t>(config_.hidden_size), 1.0f);
    const HostMatrix norm = {ones.data(), DType::kF32, 1, config_.hidden_size};
    const auto weight = [&](int64_t rows, int64_t cols) {
      return HostMatrix{values.data(), DType::kBF16, rows, cols};
    };
    const int64_t hidden = config_.hidden_size;
    LayerWeights layer{.input_norm = norm,
                       .post_norm = norm,
                       .q = weight(config_.q_size(), hidden),
                       .k = weight(config_.kv_size(), hidden),
                       .v = weight(config_.kv_size(), hidden),
                       .o = weight(hidden, config_.q_size()),
                       .gate = weight(config_.intermediate_size, hidden),
                       .up = weight(config_.intermediate_size, hidden),
                       .down = weight(hidden, config_.intermediate_size)};
    ModelWeights weights{.embed_tokens = weight(config_.vocab_size, hidden),
                         .final_norm = norm,
                         .lm_head = weight(config_.vocab_size, hidden)};
    weights.layers.assign(static_cast<size_t>(config_.num_layers), layer);
    model_ = Value(LlamaModel::Create(&backend_, config_, weights, DType::kBF16,
                                      std::max(kContext, kMostSequences), kMostSequences));
  }

  const InstalledAdapter* AdapterOf(Adapters adapters, int64_t sequence) const {
    if (adapters == kNone) return nullptr;
    return adapters_[static_cast<size_t>(adapters == kShared ? kMostSequences : sequence)].get();
  }

  // The next token of so many sequences.
  Step StepOf(int64_t sequences, Adapters adapters) const {
    Step step;
    for (int64_t s = 0; s < sequences; ++s) {
      const auto row = static_cast<int32_t>(s);
      Add(step, s, kContext, 1);
      step.logit_rows.push_back(row);
      if (adapters == kMixed) step.segments.push_back({row, 1, AdapterOf(adapters, s)});
    }
    if (adapters == kShared) {
      step.segments.push_back({0, static_cast<int32_t>(sequences), AdapterOf(adapters, 0)});
    }
    return step;
  }
  // The first tokens of one.
  Step StepOf(int64_t rows, Adapters adapters, int64_t sequence) const {
    Step step;
    Add(step, sequence, 0, rows);
    step.logit_rows.push_back(static_cast<int32_t>(rows) - 1);
    const InstalledAdapter* const adapter = AdapterOf(adapters, sequence);
    if (adapter != nullptr) step.segments.push_back({0, static_cast<int32_t>(rows), adapter});
    return step;
  }
  void Add(Step& step, int64_t sequence, int64_t begin, int64_t count) const {
    step.sequences.push_back({static_cast<int32_t>(step.tokens.size()), static_cast<int32_t>(count),
                              static_cast<int32_t>(begin + count),
                              static_cast<int32_t>(sequence * blocks_ * layout_.pages_per_block)});
    for (int64_t position = begin; position < begin + count; ++position) {
      step.positions.push_back(static_cast<int32_t>(position));
      step.tokens.push_back(
          static_cast<int32_t>((position * 31 + sequence * 17) % config_.vocab_size));
    }
  }

  Tensor Queue(const Step& step) {
    backend_.BeginStep(nullptr, step.inputs(pages_));
    return QueueBegun(step);
  }
  Tensor QueueBegun(const Step& step) {
    model_->Forward(nullptr, static_cast<int64_t>(step.tokens.size()));
    return model_->Logits(nullptr, step.logit_rows);
  }
  double Once(const Step& step) {
    return device_.Seconds([&] { backend_.BeginStep(nullptr, step.inputs(pages_)); },
                           [&] { QueueBegun(step); });
  }

  // Runs the step: as it is, recorded, and repeated. Empty if all logits are numbers, and those of
  // a sequence with an adapter are not the base model's.
  std::string WhatIsWrong(const Step& step) {
    std::vector<uint16_t> logits;
    for (int i = 0; i < 3; ++i) logits = device_.Download(Queue(step));
    Step base = step;
    base.segments.clear();
    const std::vector<uint16_t> without = device_.Download(Queue(base));
    const auto vocab = static_cast<size_t>(config_.vocab_size);
    for (size_t row = 0; row < step.logit_rows.size(); ++row) {
      float largest = 0.0f;
      bool same = true;
      for (size_t i = row * vocab; i < (row + 1) * vocab; ++i) {
        const float value = BF16ToF32(logits[i]);
        if (!std::isfinite(value)) return "row " + std::to_string(row) + " has a NaN";
        largest = std::max(largest, std::abs(value));
        same = same && logits[i] == without[i];
      }
      if (largest == 0.0f) return "row " + std::to_string(row) + " is all zero";
      if (same != step.segments.empty()) {
        return "row " + std::to_string(row) + (same ? " has no adapter" : " is not the same twice");
      }
    }
    return "";
  }

  double LayerWeightBytes() const {
    const auto hidden = static_cast<double>(config_.hidden_size);
    const double values = hidden * (2.0 * config_.q_size() + 2.0 * config_.kv_size() +
                                    3.0 * config_.intermediate_size);
    return 2.0 * values * config_.num_layers;
  }
  double NeededBytes(const Step& step) const {
    double bytes = LayerWeightBytes() + 2.0 * config_.vocab_size * config_.hidden_size;
    for (const SequenceSpan& sequence : step.sequences) {
      bytes += 4.0 * sequence.context_length * config_.kv_size() * config_.num_layers;
    }
    for (const LoraSegment& segment : step.segments) {
      bytes += static_cast<double>(segment.adapter->weight_bytes());
    }
    return bytes;
  }

  Device& device_;
  CudaBackend& backend_;
  ModelConfig config_;
  KvLayout layout_;
  int64_t blocks_ = 0;  // of a sequence
  std::vector<PageId> pages_;
  std::vector<std::unique_ptr<InstalledAdapter>> adapters_;
  std::unique_ptr<LlamaModel> model_;
};

void RegisterAll(Device& device) {
  const auto bench = std::make_shared<StepBench>(device);
  std::vector<std::vector<int64_t>> decode, prefill;
  for (const int64_t rows :
       kRehearsal ? std::vector<int64_t>{1, 3} : std::vector<int64_t>{1, 16, 64}) {
    for (const int64_t adapters : {kNone, kShared, kMixed}) decode.push_back({rows, adapters});
  }
  for (const int64_t adapters : {kNone, kShared}) prefill.push_back({kContext, adapters});
  const std::vector<std::string> names = {"rows", "adapters"};
  Register("Decode", names, decode, [bench](benchmark::State& s) { bench->Run(s, true); });
  Register("Prefill", names, prefill, [bench](benchmark::State& s) { bench->Run(s, false); });
}

}  // namespace
}  // namespace loraserve::bench

int main(int argc, char** argv) {
  return loraserve::bench::Main(argc, argv, loraserve::bench::RegisterAll);
}
