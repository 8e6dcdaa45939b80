#include "engine/model_runner.h"

#include <algorithm>
#include <utility>

#include "lora/adapter_batch.h"

namespace loraserve {

void ModelRunner::Install(AdapterId id, std::unique_ptr<InstalledAdapter> adapter) {
  adapter_weight_bytes_ += adapter->weight_bytes();
  installed_[id] = std::move(adapter);
}

void ModelRunner::Evict(AdapterId id) {
  const auto found = installed_.find(id);
  if (found == installed_.end()) return;
  adapter_weight_bytes_ -= found->second->weight_bytes();
  installed_.erase(found);
}

void ModelRunner::BuildInputs(const StepBatch& batch, const std::vector<size_t>& order) {
  token_ids_.clear();
  positions_.clear();
  spans_.clear();
  segments_.clear();
  std::vector<AdapterId> adapters;
  std::vector<int32_t> counts;
  adapters.reserve(order.size());
  counts.reserve(order.size());
  size_t num_blocks = 0;
  for (const StepItem& item : batch.items) num_blocks += item.sequence->blocks.size();
  // Not cleared before: it is long, and all of it is written below.
  const uint32_t pages_per_block = blocks_->pages_per_block();
  pages_.resize(num_blocks * pages_per_block);
  PageId* next_page = pages_.data();
  for (const size_t i : order) {
    const StepItem& item = batch.items[i];
    const Sequence& sequence = *item.sequence;
    spans_.push_back({.row_begin = static_cast<int32_t>(token_ids_.size()),
                      .row_count = item.count,
                      .context_length = item.begin + item.count,
                      .page_begin = static_cast<int32_t>(next_page - pages_.data())});
    for (int32_t position = item.begin; position < item.begin + item.count; ++position) {
      token_ids_.push_back(sequence.tokens[static_cast<size_t>(position)]);
      positions_.push_back(position);
    }
    for (const Sequence::Block& block : sequence.blocks) {
      const PageId* const own = blocks_->pages(block.id).data();
      for (uint32_t page = 0; page < pages_per_block; ++page) *next_page++ = own[page];
    }
    adapters.push_back(sequence.request.adapter);
    counts.push_back(item.count);
  }
  for (const AdapterRun& run : GroupByAdapter(adapters, counts)) {
    segments_.push_back({.row_begin = run.row_begin,
                         .row_count = run.row_count,
                         .adapter = installed_.at(run.adapter).get()});
  }
}

std::vector<ModelRunner::LogitRow> ModelRunner::LogitRows(const StepBatch& batch,
                                                          const std::vector<size_t>& order) const {
  std::vector<LogitRow> rows;
  rows.reserve(order.size());
  for (size_t s = 0; s < order.size(); ++s) {
    const StepItem& item = batch.items[order[s]];
    const Sequence& sequence = *item.sequence;
    const int32_t first_row = spans_[s].row_begin;
    // A preempted request has told its prompt's logprobs already.
    const auto told = static_cast<int32_t>(sequence.prompt_logprobs.size());
    if (sequence.request.params.prompt_logprobs) {
      const int32_t end = std::min(item.begin + item.count, sequence.prompt_length() - 1);
      for (int32_t position = std::max(item.begin, told); position < end; ++position) {
        rows.push_back({.row = first_row + position - item.begin,
                        .item = order[s],
                        .forced_token = sequence.tokens[static_cast<size_t>(position) + 1]});
      }
    }
    if (item.samples) rows.push_back({.row = first_row + item.count - 1, .item = order[s]});
  }
  return rows;
}

SampleRow ModelRunner::MakeSampleRow(const StepItem& item, int32_t forced_token) const {
  const Sequence& sequence = *item.sequence;
  const SamplingParams& params = sequence.request.params;
  SampleRow row;
  row.forced_token = forced_token;
  row.want_logprob = forced_token >= 0 || params.logprobs >= 0;
  row.num_top_logprobs = std::max(params.logprobs, 0);
  if (forced_token >= 0) return row;
  row.temperature = params.temperature;
  row.top_k = params.top_k;
  row.top_p = params.top_p;
  row.min_p = params.min_p;
  row.repetition_penalty = params.repetition_penalty;
  row.presence_penalty = params.presence_penalty;
  row.frequency_penalty = params.frequency_penalty;
  row.seed = params.seed;
  row.position = static_cast<uint64_t>(sequence.num_tokens());
  const std::span<const int32_t> tokens(sequence.tokens);
  const auto prompt =
      static_cast<size_t>(sequence.prompt_length() - sequence.request.resumed_tokens);
  row.prompt = tokens.first(prompt);
  row.output = tokens.subspan(prompt);
  row.logit_bias = params.logit_bias;
  if (static_cast<int32_t>(row.output.size()) < params.min_tokens) {
    row.banned = params.stop_token_ids;
  }
  return row;
}

std::vector<SampleResult> ModelRunner::Run(const StepBatch& batch) {
  // Sequences of one adapter side by side: one segment for each adapter.
  std::vector<std::pair<AdapterId, size_t>> by_adapter;
  by_adapter.reserve(batch.items.size());
  for (const StepItem& item : batch.items) {
    by_adapter.emplace_back(item.sequence->request.adapter, by_adapter.size());
  }
  std::sort(by_adapter.begin(), by_adapter.end());
  std::vector<size_t> order;
  order.reserve(by_adapter.size());
  for (const auto& [adapter, item] : by_adapter) order.push_back(item);
  BuildInputs(batch, order);
  backend_->BeginStep(nullptr, {.token_ids = token_ids_,
                                .positions = positions_,
                                .sequences = spans_,
                                .block_pages = pages_,
                                .segments = segments_});
  model_->Forward(nullptr, static_cast<int64_t>(token_ids_.size()));

  std::vector<SampleResult> results(batch.items.size());
  const std::vector<LogitRow> logit_rows = LogitRows(batch, order);
  for (size_t begin = 0; begin < logit_rows.size(); begin += static_cast<size_t>(max_logit_rows_)) {
    const size_t count = std::min(static_cast<size_t>(max_logit_rows_), logit_rows.size() - begin);
    std::vector<int32_t> rows;
    std::vector<SampleRow> sample_rows;
    rows.reserve(count);
    sample_rows.reserve(count);
    for (size_t i = begin; i < begin + count; ++i) {
      const LogitRow& logit_row = logit_rows[i];
      rows.push_back(logit_row.row);
      sample_rows.push_back(MakeSampleRow(batch.items[logit_row.item], logit_row.forced_token));
    }
    const Tensor logits = model_->Logits(nullptr, rows);
    std::vector<SampleResult> sampled(count);
    backend_->Sample(nullptr, logits, sample_rows, sampled);
    for (size_t i = 0; i < count; ++i) {
      const LogitRow& logit_row = logit_rows[begin + i];
      if (logit_row.forced_token < 0) {
        results[logit_row.item] = std::move(sampled[i]);
      } else {
        Sequence& sequence = *batch.items[logit_row.item].sequence;
        sequence.prompt_logprobs.push_back(sampled[i].logprob);
        if (sequence.request.params.logprobs > 0) {
          sequence.prompt_top_logprobs.push_back(std::move(sampled[i].top_logprobs));
        }
      }
    }
  }
  return results;
}

}  // namespace loraserve
