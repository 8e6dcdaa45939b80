// One model on one device: takes requests, steps, gives tokens.
//
// Not thread-safe; engine_thread.h is. Only Validate and ValidateAdapter may be called from
// anywhere.
#pragma once

#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backend/registry.h"
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
  bool record_steps = false;  // StepRecords in the reports, for profiling
};

// What one step brought.
struct StepReport {
  std::vector<Output> outputs;
  std::vector<AdapterId> removed_adapters;  // their bytes are not read any more
  // Adapters written into pages (true) and out of them (false), in this order. A removed adapter is
  // out without a word.
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

  // Schedule, run, sample, publish. `now` is MonotonicSeconds().
  StepReport Step(double now);
  // Whether Step would bring anything.
  bool HasWork() const { return scheduler_->HasWork() || !pending_.empty(); }

  EngineStats stats() const;
  std::string backend_name() const { return backend_->name(); }

 private:
  Engine(const EngineConfig& config, const ModelConfig& model) : config_(config), model_(model) {}
  Status Initialize(const ModelWeights& weights);
  void Finish(RequestId id, FinishReason reason, Status error, Output* last);
  void Publish(const StepBatch& batch, std::vector<SampleResult> results);
  int32_t MaxTokens(const Request& request) const;
  StepRecord Describe(const StepBatch& batch) const;

  EngineConfig config_;
  ModelConfig model_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LlamaModel> llama_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<ModelRunner> runner_;
  std::vector<Output> pending_;                   // for the next report
  std::unordered_map<AdapterId, int32_t> ranks_;  // of the adapters, the largest of their modules
  EngineStats stats_;
};

}  // namespace loraserve
