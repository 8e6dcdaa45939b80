// The scheduler without a model: what a step costs before and after the kernels.
//
// A sequence-step is one sequence's part of one step; the aim is a million a second with 256
// sequences, of the thread's own processor time. Shapes are those of a model of 12 layers on the
// CPU, with six pages for a block of 16 tokens, and of adapters of ranks 8 to 128 on all its
// modules. Every request has a deadline. A case checks that it does what it says.
#include "engine/scheduler.h"

#include <benchmark/benchmark.h>

#include <iterator>
#include <memory>
#include <string>
#include <utility>

#include "base/check.h"

namespace loraserve {
namespace {

constexpr int32_t kSequences = 256;
constexpr uint32_t kPagesPerBlock = 6;
constexpr uint64_t kPageBytes = 64 << 10;
constexpr uint32_t kRanks[] = {8, 16, 32, 64, 128};
constexpr uint32_t kPagesPerRank = 10;
constexpr int32_t kSharedTokens = 64;  // of a prompt, with all of its adapter
constexpr int kRound = 512;            // steps of steady decode, until the next round starts over
constexpr int32_t kEndless = 4 * kRound;  // tokens: nobody ends in a round

uint32_t AdapterPages(int adapter) {
  return kPagesPerRank * kRanks[static_cast<size_t>(adapter) % std::size(kRanks)];
}

struct LoadShape {
  int32_t prompt = 128;
  int32_t output = kEndless;  // tokens; each request's is between half and one and a half of it
  int adapters = 0;           // 0: the base model alone
  int64_t room = 0;           // tokens that the KV pages hold
  SchedulerConfig config;
};

// Requests that come and go on a scheduler, and a step as the engine takes it.
class Load {
 public:
  explicit Load(const LoadShape& shape) : shape_(shape), scheduler_(Config(shape), Arena(shape)) {
    for (int i = 1; i <= shape.adapters; ++i) {
      const uint32_t pages = AdapterPages(i);
      LS_CHECK(scheduler_.AddAdapter(static_cast<AdapterId>(i), pages, pages * kPageBytes).ok());
    }
  }

  void Submit() {
    const RequestId id = ++submitted_;
    auto sequence = std::make_unique<Sequence>();
    Request& request = sequence->request;
    request.id = id;
    if (shape_.adapters > 0) {
      request.adapter = 1 + id % static_cast<uint64_t>(shape_.adapters);
    }
    for (int32_t i = 0; i < shape_.prompt; ++i) {
      request.prompt.push_back(Token(i < kSharedTokens ? request.adapter : id << 8, i));
    }
    const auto output = static_cast<uint64_t>(shape_.output);
    request.params.max_tokens = static_cast<int32_t>(output / 2 + id * 2654435761u % output);
    request.cache_namespace = std::to_string(request.adapter);
    request.deadline = 1e9 + static_cast<double>(id % 1000);
    sequence->tokens = request.prompt;
    LS_CHECK(scheduler_.Add(std::move(sequence)).ok());
  }

  // A new request comes for each that ends.
  void Step() {
    LS_CHECK(scheduler_.Expired(1).empty());
    const StepBatch batch = scheduler_.Schedule();
    for (const AdapterChange& change : batch.changes) {
      if (change.install) scheduler_.EndInstall(change.adapter, true);
    }
    LS_CHECK(scheduler_.TakeUnneeded().empty());
    scheduler_.Computed(batch);
    for (const StepItem& item : batch.items) {
      if (!item.samples) continue;
      Sequence& sequence = *item.sequence;
      sequence.tokens.push_back(Token(sequence.request.id << 8, sequence.num_tokens()));
      if (sequence.num_output() < sequence.request.params.max_tokens) continue;
      scheduler_.Take(sequence.request.id);
      Submit();
    }
    LS_CHECK(scheduler_.TakeRemoved().empty());
    ++steps;
    items += static_cast<int64_t>(batch.items.size());
    tokens += batch.num_tokens;
  }

  // As many requests, and steps until all of them decode.
  void StartDecoding(int count) {
    for (int i = 0; i < count; ++i) Submit();
    int64_t before = 0;
    do {
      before = tokens;
      Step();
    } while (scheduler_.num_waiting() > 0 || tokens - before != count);
    ResetCounts();
  }
  void ResetCounts() { steps = items = tokens = 0; }

  const Scheduler& scheduler() const { return scheduler_; }

  int64_t steps = 0;
  int64_t items = 0;
  int64_t tokens = 0;

 private:
  static int32_t Token(uint64_t stream, int32_t position) {
    const uint64_t mixed = (stream + static_cast<uint64_t>(position)) * 0x9E3779B97F4A7C15ull;
    return static_cast<int32_t>(mixed >> 49);
  }
  static SchedulerConfig Config(const LoadShape& shape) {
    SchedulerConfig config = shape.config;
    config.pages_per_block = kPagesPerBlock;
    return config;
  }
  static PageArena Arena(const LoadShape& shape) {
    int64_t pages = shape.room / shape.config.block_size * kPagesPerBlock;
    for (int i = 1; i <= shape.adapters; ++i) pages += AdapterPages(i);
    return std::move(PageArena::Create(kPageBytes, static_cast<uint32_t>(pages)).value());
  }

  LoadShape shape_;
  Scheduler scheduler_;
  uint64_t submitted_ = 0;
};

void Report(benchmark::State& state, int64_t steps, int64_t items, int64_t tokens) {
  using benchmark::Counter;
  const auto count = static_cast<double>(steps);
  state.counters["seq_steps/s"] = Counter(static_cast<double>(items), Counter::kIsRate);
  state.counters["s/step"] = Counter(count, Counter::kIsRate | Counter::kInvert);
  state.counters["running"] = static_cast<double>(items) / count;
  state.counters["prefill"] =
      static_cast<double>(tokens - items) / count;  // tokens beyond one each
}

// Rounds of decoding, each started over from `prepare`.
template <class Prepare>
void RunRounds(benchmark::State& state, int32_t sequences, Prepare&& prepare) {
  int64_t steps = 0;
  for (auto _ : state) {
    state.PauseTiming();
    std::unique_ptr<Load> load = prepare();
    state.ResumeTiming();
    for (int i = 0; i < kRound; ++i) load->Step();
    state.PauseTiming();
    LS_CHECK(load->items == int64_t{kRound} * sequences && load->tokens == load->items);
    steps += kRound;
    load.reset();
    state.ResumeTiming();
  }
  Report(state, steps, steps * sequences, steps * sequences);
}

LoadShape Decoding(int32_t sequences, int32_t context, int adapters, bool prefix_cache) {
  return {.prompt = context,
          .adapters = adapters,
          .room = int64_t{sequences} * (context + 2 * kRound),
          // All prompts in few steps: nothing is measured of them.
          .config = {
              .max_batch_tokens = 65536, .max_sequences = sequences, .prefix_cache = prefix_cache}};
}

// Every sequence a token in every step, nobody comes or goes.
void Decode(benchmark::State& state) {
  const auto sequences = static_cast<int32_t>(state.range(0));
  const LoadShape shape = Decoding(sequences, static_cast<int32_t>(state.range(1)),
                                   static_cast<int>(state.range(2)), state.range(3) != 0);
  RunRounds(state, sequences, [&] {
    auto load = std::make_unique<Load>(shape);
    load->StartDecoding(sequences);
    return load;
  });
}

// Beside requests of 64 adapters that find no place.
void DecodeBesideWaiting(benchmark::State& state) {
  const LoadShape shape = Decoding(kSequences, 256, 64, true);
  RunRounds(state, kSequences, [&] {
    auto load = std::make_unique<Load>(shape);
    load->StartDecoding(kSequences);
    for (int64_t i = 0; i < state.range(0); ++i) load->Submit();
    return load;
  });
}

void RunOn(benchmark::State& state, Load& load) {
  for (int i = 0; i < 2000; ++i) load.Step();
  load.ResetCounts();
  const uint64_t preemptions = load.scheduler().counters().preemptions;
  for (auto _ : state) load.Step();
  Report(state, load.steps, load.items, load.tokens);
  state.counters["preempted"] =
      static_cast<double>(load.scheduler().counters().preemptions - preemptions) /
      static_cast<double>(load.steps);
}

// Prompts of 192 tokens in chunks beside the decodes, about one request a step coming and going;
// the second argument is the memory, in percent of what the running sequences take. With less than
// 100 they preempt each other.
void Turnover(benchmark::State& state) {
  constexpr int32_t kPrompt = 192;
  constexpr int32_t kOutput = 256;
  Load load({.prompt = kPrompt,
             .output = kOutput,
             .adapters = static_cast<int>(state.range(0)),
             .room = int64_t{kSequences} * (kPrompt + kOutput / 2) * state.range(1) / 100,
             .config = {.max_sequences = kSequences, .prefix_cache = state.range(2) != 0}});
  for (int i = 0; i < kSequences + 16; ++i) load.Submit();
  RunOn(state, load);
}

// A thousand requests of 64 adapters, of which a step may read as many bytes as about 16 have.
void LimitedAdapters(benchmark::State& state) {
  constexpr int kAdapters = 64;
  uint64_t pages = 0;
  for (int i = 1; i <= kAdapters; ++i) pages += AdapterPages(i);
  Load load({.prompt = 64,
             .output = 64,
             .adapters = kAdapters,
             .room = int64_t{kSequences} * 256,
             .config = {.max_sequences = kSequences,
                        .max_step_adapter_bytes = pages * kPageBytes / 4,
                        .max_overtakes = kSequences}});
  for (int i = 0; i < 1000; ++i) load.Submit();
  RunOn(state, load);
}

BENCHMARK(Decode)
    ->ArgNames({"sequences", "context", "adapters", "cache"})
    ->ArgsProduct({{kSequences}, {128, 1024, 4096}, {0, 64}, {0, 1}})
    ->Args({32, 1024, 0, 1})
    ->Args({32, 1024, 8, 1})
    ->Unit(benchmark::kMillisecond);
BENCHMARK(DecodeBesideWaiting)
    ->ArgNames({"waiting"})
    ->Arg(1000)
    ->Arg(10000)
    ->Unit(benchmark::kMillisecond);
BENCHMARK(Turnover)
    ->ArgNames({"adapters", "memory_%", "cache"})
    ->ArgsProduct({{0, 64}, {150, 80}, {0, 1}})
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(LimitedAdapters)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace loraserve

BENCHMARK_MAIN();
