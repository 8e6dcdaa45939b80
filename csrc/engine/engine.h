// One model on one device: takes requests, steps, gives tokens.
//
// Not thread-safe; engine_thread.h is. Only Validate and ValidateAdapter may be called from
// anywhere. It has one thread of its own, the installer's.
#pragma once

#include <functional>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backend/registry.h"
#include "engine/installer.h"
#include "engine/model_runner.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "engine/stats.h"
#include "engine/step_record.h"
#include "model/model_config.h"
#include "model/weights.h"

namespace loraserve {

struct EngineConfig {
  BackendOptions backend;
  DType weight_dtype = DType::kF32;    // kF32 or kBF16
  uint64_t memory_bytes = 1ull << 30;  // of the page arena: KV blocks and adapters together
  int32_t block_size = 16;
  uint64_t page_bytes = 0;  // 0: chosen from the model's shape
  int32_t max_batch_tokens = 512;
  int32_t max_sequences = 64;
  uint64_t max_step_adapter_bytes = 0;
  bool prefix_cache = true;
  bool prefetch = true;       // install adapters when they are added, while pages are free
  bool record_steps = false;  // StepRecords in the reports, for profiling
};

// What one step brought.
struct StepReport {
  std::vector<Output> outputs;
  std::vector<AdapterId> removed_adapters;  // their bytes are not read any more
  // Adapters that are in pages from now on (true) or no more (false), in this order. A removed
  // adapter is out without a word.
  std::vector<std::pair<AdapterId, bool>> installs;
  std::vector<StepRecord> records;  // with EngineConfig::record_steps
  bool empty() const {
    return outputs.empty() && removed_adapters.empty() && installs.empty() && records.empty();
  }
  // Takes over what came later.
  void Append(StepReport later);
};

class Engine {
 public:
  // `weights` need not outlive the call.
  static Result<std::unique_ptr<Engine>> Create(const EngineConfig& config,
                                                const ModelConfig& model,
                                                const ModelWeights& weights);
  // On a backend made elsewhere; `config.backend` is not looked at.
  static Result<std::unique_ptr<Engine>> Create(const EngineConfig& config,
                                                std::unique_ptr<Backend> backend,
                                                const ModelConfig& model,
                                                const ModelWeights& weights);

  // kInvalidArgument or kResourceExhausted, naming the field; thread-safe.
  Status Validate(const Request& request) const;
  // kFailedPrecondition if the adapter does not fit the model, naming layer and module;
  // thread-safe.
  Status ValidateAdapter(const AdapterSource& source) const;

  // An error comes back as an Output of the next step.
  void Submit(Request request);
  void Abort(RequestId id);
  // The bytes behind `source` stay valid until a report lists the id as removed.
  Status AddAdapter(AdapterId id, AdapterSource source);
  Status RemoveAdapter(AdapterId id);
  // Brings the adapter into pages before it is asked for, in the place of what would be evicted
  // next; a hint.
  void Prefetch(AdapterId id) { scheduler_->Prefetch(id, /*evict=*/true); }

  // Called, by another thread, when Step would bring something though HasWork() said no. Set before
  // the first adapter is added.
  void OnWake(std::function<void()> wake) { wake_ = std::move(wake); }

  // Schedule, run, sample, publish. `now` is MonotonicSeconds().
  StepReport Step(double now);
  // Whether Step would bring anything. If not, it may once OnWake's function has been called, a
  // request or an adapter has come or gone, or a deadline has passed.
  bool HasWork() const { return ran_ || !pending_.empty(); }
  // When the next waiting or running request expires; 0: none does.
  double NextDeadline() const { return scheduler_->NextDeadline(); }
  // No adapter's bytes are read any more. The engine is good for nothing afterwards.
  void Stop() { installer_->Stop(); }

  EngineStats stats() const;
  std::string backend_name() const { return backend_->name(); }
  // As Backend's; by any thread.
  Result<bool> RegisterHostMemory(void* memory, uint64_t bytes) {
    return backend_->RegisterHostMemory(memory, bytes);
  }

 private:
  Engine(const EngineConfig& config, const ModelConfig& model) : config_(config), model_(model) {}
  // With limits that were looked at.
  static Result<std::unique_ptr<Engine>> Make(const EngineConfig& config,
                                              std::unique_ptr<Backend> backend,
                                              const ModelConfig& model,
                                              const ModelWeights& weights);
  Status Initialize(const ModelWeights& weights);
  void Started(Sequence& sequence, double now);
  void Measure(const StepBatch& batch, double seconds);
  void Finish(RequestId id, FinishReason reason, Status error, Output* last);
  void Publish(const StepBatch& batch, std::vector<SampleResult> results);
  int32_t MaxTokens(const Request& request) const;
  StepRecord Describe(const StepBatch& batch) const;
  void TakeInstalled(double now, StepReport& report);
  void Apply(const std::vector<AdapterChange>& changes, StepReport& report);

  struct Adapter {
    std::shared_ptr<const AdapterSource> source;
    int32_t rank = 0;          // the largest of its modules
    double installed_at = -1;  // the last time
  };

  EngineConfig config_;
  ModelConfig model_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LlamaModel> llama_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<ModelRunner> runner_;
  std::vector<Output> pending_;  // for the next report
  std::unordered_map<AdapterId, Adapter> adapters_;
  EvictionCosts costs_;
  bool ran_ = false;  // the last step computed something, so the next one may
  EngineStats stats_;
  std::function<void()> wake_;
  std::unique_ptr<Installer> installer_;  // last: it uses what is above
};

}  // namespace loraserve
