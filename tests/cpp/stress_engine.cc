// Drives an EngineThread from several threads at once: submits, aborts, deadlines, adapters loaded,
// replaced and unloaded in flight, also while they are being installed, memory so short that
// sequences are preempted; and stops it while it is busy, also with installs. Checks that every
// request ends exactly once and that no page is lost. Run under ASAN, UBSAN and TSAN.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "engine/engine_thread.h"

using namespace loraserve;

namespace {

constexpr int kVocab = 61;
constexpr int kHidden = 32;
constexpr int kHeads = 2;
constexpr int kHeadDim = 16;
constexpr int kIntermediate = 48;
constexpr int kLayers = 2;
constexpr int kAdapters = 6;

// Random matrices that live as long as the program.
class Matrices {
 public:
  HostMatrix Make(int64_t rows, int64_t cols) {
    auto& values = storage_.emplace_back(static_cast<size_t>(rows * cols));
    std::normal_distribution<float> normal(0.0f, 0.2f);
    for (float& value : values) value = normal(random_);
    return {.data = values.data(), .dtype = DType::kF32, .rows = rows, .cols = cols};
  }

 private:
  std::mt19937 random_{7};
  std::list<std::vector<float>> storage_;
};

ModelConfig Config() {
  ModelConfig config{.vocab_size = kVocab,
                     .hidden_size = kHidden,
                     .num_layers = kLayers,
                     .num_heads = kHeads,
                     .num_kv_heads = 1,
                     .head_dim = kHeadDim,
                     .intermediate_size = kIntermediate,
                     .max_position = 256};
  for (int i = 0; i < kHeadDim / 2; ++i) config.inverse_frequencies.push_back(1.0f / (1 + i));
  config.windows.assign(kLayers, 0);
  return config;
}

ModelWeights Weights(Matrices& matrices) {
  ModelWeights weights;
  weights.embed_tokens = matrices.Make(kVocab, kHidden);
  weights.final_norm = matrices.Make(1, kHidden);
  for (int layer = 0; layer < kLayers; ++layer) {
    LayerWeights w;
    w.input_norm = matrices.Make(1, kHidden);
    w.post_norm = matrices.Make(1, kHidden);
    w.q = matrices.Make(kHeads * kHeadDim, kHidden);
    w.k = matrices.Make(kHeadDim, kHidden);
    w.v = matrices.Make(kHeadDim, kHidden);
    w.o = matrices.Make(kHidden, kHeads * kHeadDim);
    w.gate = matrices.Make(kIntermediate, kHidden);
    w.up = matrices.Make(kIntermediate, kHidden);
    w.down = matrices.Make(kHidden, kIntermediate);
    weights.layers.push_back(w);
  }
  return weights;
}

AdapterSource Adapter(Matrices& matrices, int rank) {
  AdapterSource source;
  for (int layer = 0; layer < kLayers; ++layer) {
    source.modules.push_back({.layer = layer,
                              .module = LinearModule::kDown,
                              .rank = rank,
                              .scaling = 1.0f,
                              .a = matrices.Make(rank, kIntermediate),
                              .b = matrices.Make(rank, kHidden)});
  }
  return source;
}

struct Ledger {
  std::mutex mutex;
  std::unordered_map<RequestId, int32_t> next_index;  // of unfinished requests
  uint64_t ended = 0;
  uint64_t expired = 0;
  uint64_t cancelled = 0;
  std::vector<AdapterId> removed;
};

void Collect(EngineThread& engine, Ledger& ledger) {
  while (auto report = engine.WaitReport(0.1)) {
    const std::lock_guard<std::mutex> lock(ledger.mutex);
    for (const Output& output : report->outputs) {
      const auto found = ledger.next_index.find(output.id);
      LS_CHECK(found != ledger.next_index.end());
      if (!output.token_ids.empty()) {
        LS_CHECK(output.first_index == found->second);
        ++found->second;
      }
      if (output.finish_reason != FinishReason::kNone) {
        ledger.next_index.erase(found);
        ++ledger.ended;
        ledger.expired += output.error.code() == StatusCode::kDeadlineExceeded ? 1 : 0;
        ledger.cancelled += output.finish_reason == FinishReason::kCancelled ? 1 : 0;
      }
    }
    ledger.removed.insert(ledger.removed.end(), report->removed_adapters.begin(),
                          report->removed_adapters.end());
  }
}

void SubmitMany(EngineThread& engine, Ledger& ledger, int thread, int count,
                const std::atomic<AdapterId>* current) {
  std::mt19937 random(static_cast<unsigned>(thread));
  for (int i = 0; i < count; ++i) {
    Request request;
    request.id = static_cast<RequestId>(thread) * 1000000 + static_cast<RequestId>(i) + 1;
    const auto length = 1 + random() % 40;
    for (unsigned t = 0; t < length; ++t) {
      // Few distinct tokens, so that prefixes are shared.
      request.prompt.push_back(static_cast<int32_t>(t < 20 ? t % 3 : random() % kVocab));
    }
    request.params.max_tokens = static_cast<int32_t>(1 + random() % 24);
    request.params.temperature = i % 2 == 0 ? 0.0f : 1.0f;
    request.params.logprobs = i % 3 - 1;
    request.params.prompt_logprobs = i % 11 == 0;
    request.adapter = random() % 4 == 0 ? 0 : current[random() % kAdapters].load();
    request.cache_namespace = std::to_string(request.adapter);
    request.priority = static_cast<int32_t>(random() % 3);
    if (i % 17 == 0) request.deadline = 1e-9;  // long past
    if (i % 13 == 0) {                         // while it waits or runs
      request.deadline = MonotonicSeconds() + 1e-3 * static_cast<double>(random() % 20);
    }
    {
      const std::lock_guard<std::mutex> lock(ledger.mutex);
      ledger.next_index[request.id] = 0;
    }
    const RequestId id = request.id;
    const Status status = engine.Submit(std::move(request));
    LS_CHECK(status.ok());
    if (i % 5 == 0) engine.Abort(id);
    if (i % 64 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

std::unique_ptr<Engine> Create(Matrices& matrices) {
  EngineConfig config;
  config.backend.threads = 2;
  config.memory_bytes = 26 * (16 << 10);  // a few sequences and adapters only
  config.max_batch_tokens = 48;
  config.max_sequences = 12;
  config.max_step_adapter_bytes = 8 * (16 << 10);
  auto created = Engine::Create(config, Config(), Weights(matrices));
  LS_CHECK(created.ok());
  return std::move(created.value());
}

// Stops an engine in the middle of its work, from several threads at once, while others still call
// it: no hang, and whoever comes too late is told so.
void StopWhileBusy(Matrices& matrices) {
  EngineThread engine(Create(matrices));
  constexpr RequestId kBusyAdapters = 4;  // of which two fit: they are installed all the time
  for (AdapterId id = 1; id <= kBusyAdapters; ++id) {
    LS_CHECK(engine.AddAdapter(id, Adapter(matrices, 300)).ok());
  }
  std::atomic<int> refused{0};
  std::vector<std::thread> callers;
  for (int thread = 0; thread < 2; ++thread) {
    callers.emplace_back([&, thread] {
      for (RequestId i = 1; refused.load() < 100; ++i) {
        Request request;
        request.id = static_cast<RequestId>(thread) << 32 | i;
        request.prompt = {1, 2, 3};
        request.params.max_tokens = i % 8 == 0 ? 40 : 2;
        request.adapter = 1 + i % kBusyAdapters;
        const Status status = engine.Submit(std::move(request));
        LS_CHECK(status.ok() || status.code() == StatusCode::kUnavailable);
        refused += status.ok() ? 0 : 1;
        engine.Abort(i / 2);
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
    });
  }
  std::thread collector([&] {
    while (engine.WaitReport(0.01)) {
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  std::vector<std::thread> stoppers;
  for (int i = 0; i < 3; ++i) stoppers.emplace_back([&] { engine.Stop(); });
  for (std::thread& stopper : stoppers) stopper.join();
  for (std::thread& caller : callers) caller.join();
  collector.join();
  LS_CHECK(engine.RemoveAdapter(1).code() == StatusCode::kUnavailable);
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 300;
  Matrices matrices;
  for (int i = 0; i < 5; ++i) StopWhileBusy(matrices);
  EngineThread engine(Create(matrices));

  Ledger ledger;
  std::atomic<AdapterId> current[kAdapters];
  AdapterId next_adapter = 1;
  const int ranks[kAdapters] = {1, 4, 8, 33, 64, 300};
  for (int i = 0; i < kAdapters; ++i) {
    LS_CHECK(engine.AddAdapter(next_adapter, Adapter(matrices, ranks[i])).ok());
    current[i] = next_adapter++;
  }
  std::thread collector([&] { Collect(engine, ledger); });
  std::vector<std::thread> submitters;
  for (int thread = 1; thread <= 3; ++thread) {
    submitters.emplace_back([&, thread] { SubmitMany(engine, ledger, thread, count, current); });
  }
  std::atomic<bool> done{false};
  uint64_t replaced = 0;
  std::thread replacer([&] {  // new revisions while requests run
    for (int i = 0; !done.load(); i = (i + 1) % kAdapters) {
      LS_CHECK(engine.AddAdapter(next_adapter, Adapter(matrices, ranks[i])).ok());
      const AdapterId old = current[i].exchange(next_adapter++);
      LS_CHECK(engine.RemoveAdapter(old).ok());
      ++replaced;
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
    }
  });
  for (std::thread& submitter : submitters) submitter.join();
  const uint64_t expected = 3 * static_cast<uint64_t>(count);
  for (int i = 0;; ++i) {
    {
      const std::lock_guard<std::mutex> lock(ledger.mutex);
      if (ledger.ended == expected) break;
    }
    LS_CHECK(i < 60000);  // 10 minutes: a hang is a failure
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  done = true;
  replacer.join();
  for (const std::atomic<AdapterId>& id : current) LS_CHECK(engine.RemoveAdapter(id).ok());
  for (int i = 0;; ++i) {
    {
      const std::lock_guard<std::mutex> lock(ledger.mutex);
      if (ledger.removed.size() == replaced + kAdapters) break;
    }
    LS_CHECK(i < 60000);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  const EngineStats stats = engine.stats();
  engine.Stop();
  collector.join();
  LS_CHECK(ledger.next_index.empty());
  LS_CHECK(stats.pages_adapter == 0);
  LS_CHECK(stats.running == 0 && stats.waiting == 0);
  LS_CHECK(stats.adapters_installing == 0 && stats.adapters_installed == 0);
  LS_CHECK(stats.adapter_installs > kAdapters);
  LS_CHECK(ledger.expired > 0 && ledger.cancelled > 0);
  LS_CHECK(stats.preemptions > 0 && stats.adapter_evictions > 0 && stats.prefix_hit_tokens > 0);
  std::printf("%llu requests, %llu tokens, %llu steps, %llu preemptions, %llu replacements\n",
              static_cast<unsigned long long>(ledger.ended),
              static_cast<unsigned long long>(stats.generated_tokens),
              static_cast<unsigned long long>(stats.steps),
              static_cast<unsigned long long>(stats.preemptions),
              static_cast<unsigned long long>(replaced));
  return 0;
}
