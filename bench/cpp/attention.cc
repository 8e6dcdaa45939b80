// Attention over the paged cache against what the core can do at most, one thread, by instruction
// set. The whole operation of the backend is measured: its division into tasks too.
//
// Decode: eight sequences with a row each; layers are used in turn, so that keys and values come
// from main memory as in a model step. Prefill: the last 64 rows of one sequence's context, its
// keys and values in whatever cache holds them. "of_peak" is the share of a multiply-add loop that
// ran just before (products of positions that a row sees), "of_read" that of a loop that only
// reads. Arguments: context, head size, query heads of each of the four KV heads.
#include <benchmark/benchmark.h>
#include <time.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "base/machine_limits.h"

namespace loraserve {
namespace {

constexpr int kKvHeads = 4;
constexpr int kDecodeSequences = 8;
constexpr int kPrefillRows = 64;
constexpr uint64_t kPageBytes = 64 << 10;
constexpr double kColdBytes = 160 << 20;  // in all: several times a last-level cache

double ThreadSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Work per second of this thread's own time; the best of three.
template <class Function>
double Rate(double work, Function&& function) {
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    const double begin = ThreadSeconds();
    function();
    best = std::max(best, work / (ThreadSeconds() - begin));
  }
  return best;
}

double FmaRate(const char* isa) {
  constexpr int64_t kFlops = 100'000'000;
  return Rate(static_cast<double>(kFlops),
              [&] { benchmark::DoNotOptimize(RunFmaLoop(isa, kFlops)); });
}

double ReadRate() {
  static const std::vector<float> memory(static_cast<size_t>(kColdBytes) / sizeof(float), 1.0f);
  const auto count = static_cast<int64_t>(memory.size());
  return Rate(static_cast<double>(count) * sizeof(float),
              [&] { benchmark::DoNotOptimize(RunReadLoop(memory.data(), count)); });
}

// Sequences of equal length in a cache whose pages lie anywhere, and the rows of one step: the last
// `rows` of each.
class Step {
 public:
  Step(const char* isa, int layers, int sequences, int rows, int context, int head_dim, int group)
      : backend_({.threads = 1, .adapter_dtype = std::nullopt, .isa = isa}),
        layout_{.num_layers = layers,
                .num_heads = kKvHeads * group,
                .num_kv_heads = kKvHeads,
                .head_dim = head_dim,
                .block_size = 16,
                .page_bytes = kPageBytes} {
    layout_.tile_bytes = backend_.KvTileBytes(layout_);
    layout_.tiles_per_page = static_cast<int>(layout_.page_bytes / layout_.tile_bytes);
    layout_.pages_per_block = (2 * layers + layout_.tiles_per_page - 1) / layout_.tiles_per_page;
    const int pages_each = context / layout_.block_size * layout_.pages_per_block;
    pages_.resize(static_cast<size_t>(sequences * pages_each));
    std::iota(pages_.begin(), pages_.end(), PageId{0});
    std::shuffle(pages_.begin(), pages_.end(), std::mt19937(3));
    const std::vector<float> frequencies(static_cast<size_t>(head_dim / 2), 0.01f);
    bound_ = backend_.BindPages(layout_, static_cast<uint32_t>(pages_.size()), frequencies).ok();
    if (!bound_) return;
    const int64_t width = int64_t{layout_.num_heads + 2 * kKvHeads} * head_dim;
    std::minstd_rand random(5);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    qkv_.resize(static_cast<size_t>(context * width));
    for (float& value : qkv_) value = uniform(random);
    for (int s = 0; s < sequences; ++s) {
      spans_ = {{.row_count = context, .context_length = context, .page_begin = s * pages_each}};
      Begin();
      for (int layer = 0; layer < layers; ++layer) {
        backend_.RopeAndStoreKv(nullptr, layer, {qkv_.data(), context, width, width});
      }
    }
    spans_.clear();
    for (int s = 0; s < sequences; ++s) {
      spans_.push_back({s * rows, rows, context, s * pages_each});
    }
    Begin();
    out_.resize(static_cast<size_t>(sequences * rows * layout_.num_heads * head_dim));
    in_ = {qkv_.data(), sequences * rows, width, width};
    const int64_t out = int64_t{layout_.num_heads} * head_dim;
    result_ = {out_.data(), in_.rows, out, out};
  }

  bool bound() const { return bound_; }
  void Run() {
    backend_.PagedAttention(nullptr, layer_, in_, 0, result_);
    layer_ = (layer_ + 1) % layout_.num_layers;
  }

 private:
  void Begin() {
    const SequenceSpan& last = spans_.back();
    positions_.assign(static_cast<size_t>(last.row_begin + last.row_count), 1);
    backend_.BeginStep(nullptr, {.token_ids = positions_,
                                 .positions = positions_,
                                 .sequences = spans_,
                                 .block_pages = pages_});
  }

  CpuBackend backend_;
  KvLayout layout_;
  bool bound_ = false;
  std::vector<PageId> pages_;
  std::vector<float> qkv_, out_;
  std::vector<int32_t> positions_;
  std::vector<SequenceSpan> spans_;
  Tensor in_, result_;
  int layer_ = 0;
};

void Attention(benchmark::State& state, const char* isa, int sequences, int rows, bool cold) {
  const auto context = static_cast<int>(state.range(0));
  const auto head_dim = static_cast<int>(state.range(1));
  const auto group = static_cast<int>(state.range(2));
  const double bytes = 8.0 * sequences * context * kKvHeads * head_dim;
  const int layers = cold ? std::max(1, static_cast<int>(kColdBytes / bytes)) : 1;
  // A multiply-add each for the score and for the sum of values.
  const double flops = 4.0 * sequences * rows * (context - (rows - 1) / 2.0) * kKvHeads *
                       static_cast<double>(group) * head_dim;
  Step step(isa, layers, sequences, rows, context, head_dim, group);
  if (!step.bound()) return state.SkipWithError("no memory");
  const bool generic = std::strcmp(isa, "generic") == 0;
  const double peak = generic ? 0.0 : FmaRate(isa);
  const double read = ReadRate();
  for (auto _ : state) {
    step.Run();
    benchmark::ClobberMemory();
  }
  const double calls = static_cast<double>(state.iterations());
  const auto rate = [&](double work) {
    return benchmark::Counter(work * calls, benchmark::Counter::kIsRate);
  };
  state.counters["GF/s"] = rate(flops * 1e-9);
  state.counters["GB/s"] = rate(bytes * 1e-9);
  if (!generic) state.counters["of_peak"] = rate(flops / peak);
  state.counters["of_read"] = rate(bytes / read);
}

void RegisterAll() {
  for (const char* isa : {"x86-64-v3", "x86-64-v4", "neon", "generic"}) {
    if (std::strcmp(SelectKernels(isa).name, isa) != 0) continue;
    const std::string suffix = std::string("/") + isa;
    auto* const decode = benchmark::RegisterBenchmark(
        ("Decode" + suffix).c_str(),
        [isa](benchmark::State& s) { Attention(s, isa, kDecodeSequences, 1, true); });
    auto* const prefill = benchmark::RegisterBenchmark(
        ("Prefill" + suffix).c_str(),
        [isa](benchmark::State& s) { Attention(s, isa, 1, kPrefillRows, false); });
    for (auto* const one : {decode, prefill}) {
      one->ArgNames({"context", "head", "group"})->Unit(benchmark::kMicrosecond);
      one->ArgsProduct({{128, 512, 2048, 8192}, {64, 128}, {1, 4, 8}});
      one->Args({2048, 64, 3});  // a 120M Llama: hidden 768, 12 heads, 4 KV heads
    }
  }
}

}  // namespace
}  // namespace loraserve

int main(int argc, char** argv) {
  loraserve::RegisterAll();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
