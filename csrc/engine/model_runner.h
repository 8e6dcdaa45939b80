// Turns a StepBatch into tensors, runs the model and samples.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "backend/backend.h"
#include "engine/step_batch.h"
#include "kv/block_pool.h"
#include "model/llama.h"

namespace loraserve {

class ModelRunner {
 public:
  // All outlive the runner.
  ModelRunner(Backend* backend, LlamaModel* model, const BlockPool* blocks, int64_t max_logit_rows)
      : backend_(backend), model_(model), blocks_(blocks), max_logit_rows_(max_logit_rows) {}

  // Steps may use the adapter from now on; or no more.
  void Install(AdapterId id, std::unique_ptr<InstalledAdapter> adapter);
  void Evict(AdapterId id);  // nothing if it is not installed

  // One result for each item, in order; those of items that do not sample are empty. Appends the
  // logprobs of prompt tokens to the sequences that ask for them.
  std::vector<SampleResult> Run(const StepBatch& batch);

  // Of the adapters in pages, padding left out.
  uint64_t adapter_weight_bytes() const { return adapter_weight_bytes_; }

 private:
  // A row of logits: an item's draw, or the logprob of a known prompt token.
  struct LogitRow {
    int32_t row = 0;
    size_t item = 0;
    int32_t forced_token = -1;
  };

  void BuildInputs(const StepBatch& batch, const std::vector<size_t>& order);
  std::vector<LogitRow> LogitRows(const StepBatch& batch, const std::vector<size_t>& order) const;
  SampleRow MakeSampleRow(const StepItem& item, int32_t forced_token) const;

  Backend* backend_;
  LlamaModel* model_;
  const BlockPool* blocks_;
  int64_t max_logit_rows_;
  std::unordered_map<AdapterId, std::unique_ptr<InstalledAdapter>> installed_;
  uint64_t adapter_weight_bytes_ = 0;  // of installed_

  // Of the current step; kept for their capacity.
  std::vector<int32_t> token_ids_, positions_;
  std::vector<SequenceSpan> spans_;
  std::vector<PageId> pages_;
  std::vector<LoraSegment> segments_;
};

}  // namespace loraserve
