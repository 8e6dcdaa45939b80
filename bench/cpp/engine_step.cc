// A whole step of the engine on a backend that computes nothing: what the host does beside the
// kernels. The scheduler (see scheduler.cc), the step's inputs, the calls of a model of 12 layers,
// the rows to sample from, the outputs, the report taken over as EngineThread does it.
//
// A sequence-step is one sequence's part of one step, by the thread's own processor time.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "engine/engine.h"

namespace loraserve {
namespace {

constexpr int32_t kSequences = 256;
constexpr int32_t kDrawn = 7;
constexpr int kLayers = 12;
constexpr int kHidden = 768;
constexpr int kRanks[] = {8, 16, 32, 64, 128};
constexpr uint32_t kPagesPerRank = 10;
constexpr uint64_t kPageBytes = 64 << 10;
constexpr uint64_t kTileBytes = 16 << 10;   // four in a page: six pages for a block of 16 tokens
constexpr uint64_t kTokenBytes = 24 << 10;  // of all layers' keys and values
constexpr int kRound = 512;                 // steps of steady decode, then the next engine
constexpr int32_t kEndless = 4 * kRound;    // tokens: nobody ends in a round
float zeros[128 * kHidden];                 // whatever is asked for

class NullBuffer final : public Buffer {
 public:
  void* data() override { return zeros; }
};

class NullWeight final : public PreparedWeight {
 public:
  int64_t out_features() const override { return kHidden; }
  int64_t in_features() const override { return kHidden; }
  int64_t bytes() const override { return 0; }
};

class NullAdapter final : public InstalledAdapter {
 public:
  uint64_t weight_bytes() const override { return 0; }
};

class NullInstall final : public AdapterInstall {
 public:
  bool Write(uint64_t) override { return false; }
  std::unique_ptr<InstalledAdapter> Finish() override { return std::make_unique<NullAdapter>(); }
};

// Computes nothing and draws the same token always.
class NullBackend final : public Backend {
 public:
  std::string name() const override { return "null"; }
  int64_t RowStride(int64_t cols) const override { return cols; }
  DType activation_dtype() const override { return DType::kF32; }
  Result<std::unique_ptr<Buffer>> Allocate(uint64_t) override {
    return std::unique_ptr<Buffer>(std::make_unique<NullBuffer>());
  }
  void Synchronize(Stream*) override {}
  void CopyToDevice(Stream*, const void*, void*, uint64_t) override {}
  void CopyToHost(Stream*, const void*, void*, uint64_t) override {}
  Result<std::unique_ptr<PreparedWeight>> PrepareWeight(std::span<const HostMatrix>,
                                                        std::vector<float>, DType) override {
    return std::unique_ptr<PreparedWeight>(std::make_unique<NullWeight>());
  }
  Result<std::unique_ptr<Buffer>> PrepareVector(std::span<const float>) override {
    return std::unique_ptr<Buffer>(std::make_unique<NullBuffer>());
  }
  uint64_t KvTileBytes(const KvLayout&) const override { return kTileBytes; }
  Status BindPages(const KvLayout&, uint32_t, std::span<const float>) override { return Status(); }
  uint32_t AdapterPages(const AdapterSource& source) const override {
    return kPagesPerRank * static_cast<uint32_t>(source.modules.front().rank);
  }
  Result<std::unique_ptr<AdapterInstall>> StartInstall(const AdapterSource&,
                                                       std::span<const PageId>) override {
    return std::unique_ptr<AdapterInstall>(std::make_unique<NullInstall>());
  }
  void BeginStep(Stream*, const StepInputs& inputs) override {
    benchmark::DoNotOptimize(inputs.block_pages.data());
  }
  void Embed(Stream*, const PreparedWeight&, Tensor) override {}
  void RmsNorm(Stream*, Tensor, const Buffer&, int64_t, float, Tensor) override {}
  void Gemm(Stream*, Tensor, const PreparedWeight&, bool, Tensor) override {}
  void RopeAndStoreKv(Stream*, int, Tensor) override {}
  void PagedAttention(Stream*, int, Tensor, int, Tensor) override {}
  void SiluMul(Stream*, Tensor, Tensor) override {}
  void Lora(Stream*, Tensor, std::span<const LoraTarget>, Tensor) override {}
  void GatherRows(Stream*, Tensor, std::span<const int32_t>, Tensor) override {}
  void Sample(Stream*, Tensor, std::span<const SampleRow>,
              std::span<SampleResult> results) override {
    for (SampleResult& result : results) result.token = kDrawn;
  }
};

HostMatrix Zeros(int64_t rows, int64_t cols) { return {.data = zeros, .rows = rows, .cols = cols}; }

struct Shape {
  int32_t sequences = kSequences;
  int32_t prompt = 128;
  int32_t output = kEndless;  // each request's is between half and one and a half of it
  int adapters = 0;
  int32_t max_batch_tokens = 512;
};

class Load {
 public:
  explicit Load(const Shape& shape) : shape_(shape) {
    ModelConfig model{.vocab_size = 32000,
                      .hidden_size = kHidden,
                      .num_layers = kLayers,
                      .num_heads = 12,
                      .num_kv_heads = 4,
                      .head_dim = 64,
                      .intermediate_size = 2048,
                      .max_position = 1 << 20};
    model.inverse_frequencies.assign(32, 1.0f);
    model.windows.assign(kLayers, 0);
    ModelWeights weights;
    weights.embed_tokens = Zeros(model.vocab_size, kHidden);
    weights.final_norm = Zeros(1, kHidden);
    LayerWeights layer;
    layer.input_norm = layer.post_norm = Zeros(1, kHidden);
    weights.layers.assign(kLayers, layer);
    // Twice what the running sequences take at their longest, for the prefix cache.
    const auto tokens =
        static_cast<uint64_t>(shape.sequences) *
        static_cast<uint64_t>(shape.prompt + std::min(shape.output * 2, 2 * kRound));
    EngineConfig config{.memory_bytes = 2 * tokens * kTokenBytes,
                        .page_bytes = kPageBytes,
                        .max_batch_tokens = shape.max_batch_tokens,
                        .max_sequences = shape.sequences};
    for (int i = 1; i <= shape.adapters; ++i) {
      config.memory_bytes += kPagesPerRank * static_cast<uint64_t>(Rank(i)) * kPageBytes;
    }
    engine_ =
        std::move(Engine::Create(config, std::make_unique<NullBackend>(), model, weights).value());
    for (int i = 1; i <= shape.adapters; ++i) {
      const AdapterSource source{{{.layer = 0,
                                   .module = LinearModule::kQ,
                                   .rank = Rank(i),
                                   .scaling = 1.0f,
                                   .a = Zeros(Rank(i), kHidden),
                                   .b = Zeros(Rank(i), kHidden)}}};
      LS_CHECK(engine_->AddAdapter(static_cast<AdapterId>(i), source).ok());
    }
    while (engine_->stats().adapters_installed < static_cast<uint64_t>(shape.adapters)) {
      engine_->Step(MonotonicSeconds());
      std::this_thread::yield();
    }
  }

  void Submit() {
    Request request;
    request.id = ++submitted_;
    if (shape_.adapters > 0) {
      request.adapter = 1 + request.id % static_cast<uint64_t>(shape_.adapters);
    }
    for (int32_t i = 0; i < shape_.prompt; ++i) {
      const uint64_t token = (request.id << 8) + static_cast<uint64_t>(i);
      request.prompt.push_back(static_cast<int32_t>(token * 0x9E3779B97F4A7C15ull >> 50));
    }
    const auto output = static_cast<uint64_t>(shape_.output);
    request.params.max_tokens =
        static_cast<int32_t>(output / 2 + request.id * 2654435761u % output);
    request.params.temperature = 0;
    request.params.stop_token_ids = {1, 2};
    request.cache_namespace = std::to_string(request.adapter);
    request.submitted = MonotonicSeconds();
    request.deadline = request.submitted + 1e6;
    engine_->Submit(std::move(request));
  }

  // A new request comes for each that ends.
  void Step() {
    StepReport report;
    report.Append(engine_->Step(MonotonicSeconds()));
    ++steps;
    draws += static_cast<int64_t>(report.outputs.size());
    for (const Output& output : report.outputs) {
      LS_CHECK(output.error.ok());
      if (output.finish_reason != FinishReason::kNone) Submit();
    }
  }

  void StartDecoding() {
    for (int32_t i = 0; i < shape_.sequences; ++i) Submit();
    do {
      draws = 0;
      Step();
    } while (draws != shape_.sequences);
    steps = draws = 0;
  }

  int64_t steps = 0;
  int64_t draws = 0;  // tokens that came

 private:
  static int Rank(int adapter) { return kRanks[static_cast<size_t>(adapter) % std::size(kRanks)]; }

  Shape shape_;
  std::unique_ptr<Engine> engine_;
  uint64_t submitted_ = 0;
};

void Report(benchmark::State& state, int64_t steps, int64_t draws) {
  using benchmark::Counter;
  state.counters["seq_steps/s"] = Counter(static_cast<double>(draws), Counter::kIsRate);
  state.counters["s/step"] =
      Counter(static_cast<double>(steps), Counter::kIsRate | Counter::kInvert);
}

// Every sequence a token in every step, nobody comes or goes.
void Decode(benchmark::State& state) {
  const Shape shape{.sequences = static_cast<int32_t>(state.range(0)),
                    .prompt = static_cast<int32_t>(state.range(1)),
                    .adapters = static_cast<int>(state.range(2)),
                    .max_batch_tokens = 65536};
  int64_t steps = 0;
  for (auto _ : state) {
    state.PauseTiming();
    auto load = std::make_unique<Load>(shape);
    load->StartDecoding();
    state.ResumeTiming();
    for (int i = 0; i < kRound; ++i) load->Step();
    state.PauseTiming();
    LS_CHECK(load->draws == int64_t{kRound} * shape.sequences);
    steps += kRound;
    load.reset();
    state.ResumeTiming();
  }
  Report(state, steps, steps * shape.sequences);
}

// Prompts of 192 tokens in chunks beside the decodes, about one request a step coming and going.
void Turnover(benchmark::State& state) {
  Load load({.prompt = 192, .output = 256, .adapters = static_cast<int>(state.range(0))});
  for (int i = 0; i < kSequences + 16; ++i) load.Submit();
  for (int i = 0; i < 2000; ++i) load.Step();
  load.steps = load.draws = 0;
  for (auto _ : state) load.Step();
  Report(state, load.steps, load.draws);
}

BENCHMARK(Decode)
    ->ArgNames({"sequences", "context", "adapters"})
    ->ArgsProduct({{kSequences}, {128, 1024, 4096}, {0, 64}})
    ->Args({32, 128, 0})
    ->Args({32, 1024, 8})
    ->Unit(benchmark::kMillisecond);
BENCHMARK(Turnover)->ArgNames({"adapters"})->Arg(0)->Arg(64)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace loraserve

BENCHMARK_MAIN();
