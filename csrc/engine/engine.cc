#include "engine/engine.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <unordered_set>

#include "base/check.h"
#include "base/clock.h"
#include "engine/validate.h"

namespace loraserve {

namespace {

constexpr int64_t kMaxLogitRows = 64;
constexpr uint64_t kMaxPageBytes = 1 << 30;
// Of a slow machine, until something is measured; and how much a new measurement counts.
constexpr EvictionCosts kFirstCosts = {
    .prefill_token_seconds = 1e-3, .install_seconds = 2e-4, .install_byte_seconds = 1e-9};
constexpr double kNewest = 0.1;

// The largest page from 64 down to 16 KiB that wastes at most an eighth of a KV block, else the one
// that wastes least. Large pages keep an adapter's tiles long: docs/decisions/0002-page-size.md.
uint64_t ChoosePageBytes(uint64_t tile_bytes, int tiles) {
  const uint64_t needed = static_cast<uint64_t>(tiles) * tile_bytes;
  const uint64_t smallest = std::max<uint64_t>(std::bit_ceil(tile_bytes), 16 << 10);
  uint64_t best = smallest;
  uint64_t best_waste = UINT64_MAX;
  for (uint64_t page = std::max<uint64_t>(smallest, 64 << 10); page >= smallest; page /= 2) {
    const uint64_t per_page = page / tile_bytes;
    const uint64_t pages = (static_cast<uint64_t>(tiles) + per_page - 1) / per_page;
    const uint64_t waste = pages * page - needed;
    if (waste * 8 <= needed) return page;
    if (waste < best_waste) {
      best = page;
      best_waste = waste;
    }
  }
  return best;
}

Status CheckLimits(const EngineConfig& config) {
  const auto check = [](const char* field, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return Status();
    return Status(StatusCode::kInvalidArgument, std::string(field) + ": " + std::to_string(value) +
                                                    " is not in [" + std::to_string(low) + ", " +
                                                    std::to_string(high) + "]");
  };
  for (const Status& status : {check("block_size", config.block_size, 16, 256),
                               check("max_batch_tokens", config.max_batch_tokens, 1, 65536),
                               check("max_sequences", config.max_sequences, 1, 4096)}) {
    if (!status.ok()) return status;
  }
  if (config.block_size % 16 != 0) {
    return Status(StatusCode::kInvalidArgument,
                  "block_size: " + std::to_string(config.block_size) + " is not a multiple of 16");
  }
  if (config.page_bytes > kMaxPageBytes) {
    return Status(StatusCode::kInvalidArgument, "page_bytes: " + std::to_string(config.page_bytes) +
                                                    " is more than " +
                                                    std::to_string(kMaxPageBytes));
  }
  return Status();
}

}  // namespace

Result<std::unique_ptr<Engine>> Engine::Create(const EngineConfig& config, const ModelConfig& model,
                                               const ModelWeights& weights) {
  const Status status = CheckLimits(config);
  if (!status.ok()) return status;
  auto backend = CreateBackend(config.backend);
  if (!backend.ok()) return backend.status();
  return Make(config, std::move(backend.value()), model, weights);
}

Result<std::unique_ptr<Engine>> Engine::Create(const EngineConfig& config,
                                               std::unique_ptr<Backend> backend,
                                               const ModelConfig& model,
                                               const ModelWeights& weights) {
  const Status status = CheckLimits(config);
  if (!status.ok()) return status;
  return Make(config, std::move(backend), model, weights);
}

Result<std::unique_ptr<Engine>> Engine::Make(const EngineConfig& config,
                                             std::unique_ptr<Backend> backend,
                                             const ModelConfig& model,
                                             const ModelWeights& weights) {
  std::unique_ptr<Engine> engine(new Engine(config, model));
  engine->backend_ = std::move(backend);
  const Status status = engine->Initialize(weights);
  if (!status.ok()) return status;
  return engine;
}

Status Engine::Initialize(const ModelWeights& weights) {
  KvLayout layout{.num_layers = model_.num_layers,
                  .num_heads = model_.num_heads,
                  .num_kv_heads = model_.num_kv_heads,
                  .head_dim = model_.head_dim,
                  .block_size = config_.block_size};
  layout.tile_bytes = backend_->KvTileBytes(layout);
  const int tiles = 2 * model_.num_layers;
  layout.page_bytes =
      config_.page_bytes != 0 ? config_.page_bytes : ChoosePageBytes(layout.tile_bytes, tiles);
  if (layout.page_bytes < layout.tile_bytes) {
    return Status(StatusCode::kInvalidArgument, "page_bytes: " + std::to_string(layout.page_bytes) +
                                                    " is less than one layer's keys of a block, " +
                                                    std::to_string(layout.tile_bytes));
  }
  layout.tiles_per_page = static_cast<int>(layout.page_bytes / layout.tile_bytes);
  layout.pages_per_block = (tiles + layout.tiles_per_page - 1) / layout.tiles_per_page;
  const uint64_t num_pages = config_.memory_bytes / layout.page_bytes;
  if (num_pages < static_cast<uint64_t>(layout.pages_per_block) || num_pages > UINT32_MAX) {
    return Status(StatusCode::kInvalidArgument,
                  "memory_bytes: " + std::to_string(config_.memory_bytes) + " gives " +
                      std::to_string(num_pages) + " pages of " + std::to_string(layout.page_bytes) +
                      " bytes; one KV block needs " + std::to_string(layout.pages_per_block));
  }
  // Before the books of the pages: a hopeless size fails here, by name.
  Status status =
      backend_->BindPages(layout, static_cast<uint32_t>(num_pages), model_.inverse_frequencies);
  if (!status.ok()) return status;
  auto arena = PageArena::Create(layout.page_bytes, static_cast<uint32_t>(num_pages));
  if (!arena.ok()) return arena.status();

  auto llama = LlamaModel::Create(backend_.get(), model_, weights, config_.weight_dtype,
                                  config_.max_batch_tokens, kMaxLogitRows);
  if (!llama.ok()) return llama.status();
  llama_ = std::move(llama.value());
  scheduler_ = std::make_unique<Scheduler>(
      SchedulerConfig{.block_size = config_.block_size,
                      .pages_per_block = static_cast<uint32_t>(layout.pages_per_block),
                      .max_batch_tokens = config_.max_batch_tokens,
                      .max_sequences = config_.max_sequences,
                      .max_step_adapter_bytes = config_.max_step_adapter_bytes,
                      .prefix_cache = config_.prefix_cache},
      std::move(arena.value()));
  runner_ = std::make_unique<ModelRunner>(backend_.get(), llama_.get(), &scheduler_->blocks(),
                                          kMaxLogitRows);
  costs_ = kFirstCosts;
  scheduler_->SetCosts(costs_);
  installer_ = std::make_unique<Installer>(backend_.get(), [this] {
    if (wake_) wake_();
  });
  stats_.page_bytes = layout.page_bytes;
  stats_.weight_bytes = static_cast<uint64_t>(llama_->weight_bytes());
  return Status();
}

int32_t Engine::MaxTokens(const Request& request) const {
  const auto room = model_.max_position - static_cast<int32_t>(request.prompt.size());
  return std::min(request.params.max_tokens, room);
}

Status Engine::Validate(const Request& request) const {
  Status status = ValidateRequest(request, model_);
  if (!status.ok()) return status;
  const uint32_t pages =
      scheduler_->PagesFor(static_cast<int64_t>(request.prompt.size()) + MaxTokens(request));
  const uint32_t available = scheduler_->arena().num_pages();
  if (pages <= available) return Status();
  return Status(StatusCode::kResourceExhausted,
                "prompt: prompt and max_tokens need " + std::to_string(pages) +
                    " pages, the engine has " + std::to_string(available));
}

Status Engine::ValidateAdapter(const AdapterSource& source) const {
  return ValidateAdapterSource(source, model_);
}

void Engine::Submit(Request request) {
  const RequestId id = request.id;
  request.params.max_tokens = MaxTokens(request);
  auto sequence = std::make_unique<Sequence>();
  sequence->tokens = request.prompt;
  sequence->request = std::move(request);
  Status status = scheduler_->Add(std::move(sequence));
  if (status.ok()) return;
  pending_.push_back({.id = id, .finish_reason = FinishReason::kError, .error = status});
}

void Engine::Abort(RequestId id) {
  if (scheduler_->Find(id) != nullptr) Finish(id, FinishReason::kCancelled, Status(), nullptr);
}

Status Engine::AddAdapter(AdapterId id, AdapterSource source) {
  Status status = ValidateAdapter(source);
  if (!status.ok()) return status;
  const uint32_t pages = backend_->AdapterPages(source);
  status = scheduler_->AddAdapter(id, pages, uint64_t{pages} * stats_.page_bytes);
  if (!status.ok()) return status;
  Adapter& adapter = adapters_[id];
  for (const AdapterModuleSource& module : source.modules) {
    adapter.rank = std::max(adapter.rank, static_cast<int32_t>(module.rank));
  }
  adapter.source = std::make_shared<const AdapterSource>(std::move(source));
  if (config_.prefetch) scheduler_->Prefetch(id, /*evict=*/false);
  return status;
}

Status Engine::RemoveAdapter(AdapterId id) { return scheduler_->RemoveAdapter(id); }

void Engine::Finish(RequestId id, FinishReason reason, Status error, Output* last) {
  const std::unique_ptr<Sequence> sequence = scheduler_->Take(id);
  LS_CHECK(sequence != nullptr);
  if (last == nullptr) {
    pending_.push_back({.id = id, .first_index = sequence->num_output()});
    last = &pending_.back();
    const double waited = MonotonicSeconds() - sequence->request.submitted;
    if (last->first_index == 0) {
      last->queue_seconds = sequence->queue_seconds < 0 ? waited : sequence->queue_seconds;
    }
  }
  last->finish_reason = reason;
  last->error = std::move(error);
}

void Engine::Publish(const StepBatch& batch, std::vector<SampleResult> results) {
  pending_.reserve(pending_.size() + batch.items.size());
  for (size_t i = 0; i < batch.items.size(); ++i) {
    if (!batch.items[i].samples) continue;
    Sequence& sequence = *batch.items[i].sequence;
    const SamplingParams& params = sequence.request.params;
    SampleResult& result = results[i];
    Output output{.id = sequence.request.id, .first_index = sequence.num_output()};
    output.token_ids.push_back(result.token);
    output.cached_tokens = sequence.cached_tokens;
    if (params.logprobs >= 0) output.logprobs.push_back(result.logprob);
    if (params.logprobs > 0) output.top_logprobs.push_back(std::move(result.top_logprobs));
    if (output.first_index == 0) {
      // A copy: that they are told counts when the sequence is preempted.
      output.prompt_logprobs = sequence.prompt_logprobs;
      output.prompt_top_logprobs = std::move(sequence.prompt_top_logprobs);
      output.queue_seconds = sequence.queue_seconds;
    }
    sequence.tokens.push_back(result.token);
    ++stats_.generated_tokens;
    const bool stops = std::find(params.stop_token_ids.begin(), params.stop_token_ids.end(),
                                 result.token) != params.stop_token_ids.end();
    pending_.push_back(std::move(output));
    if (stops || sequence.num_output() >= params.max_tokens) {
      Finish(sequence.request.id, stops ? FinishReason::kStop : FinishReason::kLength, Status(),
             &pending_.back());
    }
  }
}

void StepReport::Append(StepReport later) {
  const auto append = [](auto& to, auto& from) {
    if (to.empty()) {
      to = std::move(from);
      return;
    }
    to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
  };
  append(outputs, later.outputs);
  append(removed_adapters, later.removed_adapters);
  append(installs, later.installs);
  append(records, later.records);
}

StepRecord Engine::Describe(const StepBatch& batch) const {
  StepRecord record;
  std::unordered_set<AdapterId> adapters;
  for (const StepItem& item : batch.items) {
    if (item.count == 1 && item.samples) {
      ++record.decode_tokens;
      record.context_tokens += item.begin + 1;
    } else {
      record.prefill_tokens += item.count;
      record.chunk_context += item.count * (item.begin + item.count / 2.0);
    }
    const AdapterId adapter = item.sequence->request.adapter;
    if (adapter == 0) continue;
    record.token_ranks += int64_t{item.count} * adapters_.at(adapter).rank;
    adapters.insert(adapter);
  }
  record.adapters = static_cast<int32_t>(adapters.size());
  for (const AdapterId adapter : adapters) {
    record.max_rank = std::max(record.max_rank, adapters_.at(adapter).rank);
    record.adapter_bytes += static_cast<int64_t>(scheduler_->adapters().entry(adapter).bytes);
  }
  record.installs = static_cast<int32_t>(scheduler_->adapters().installing().size());
  return record;
}

void Engine::TakeInstalled(double now, StepReport& report) {
  for (Installer::Done& done : installer_->TakeDone()) {
    const bool complete = done.adapter != nullptr;
    if (complete) {
      const auto bytes = static_cast<double>(scheduler_->adapters().entry(done.id).bytes);
      costs_.install_byte_seconds +=
          kNewest * (done.writing_seconds / bytes - costs_.install_byte_seconds);
      runner_->Install(done.id, std::move(done.adapter));
      adapters_.at(done.id).installed_at = now;
      report.installs.emplace_back(done.id, true);
      ++stats_.adapter_installs;
      stats_.adapter_install_seconds += done.seconds;
    }
    scheduler_->EndInstall(done.id, complete);
    if (done.error.ok()) continue;
    // Or it would be tried again in every step.
    for (const RequestId id : scheduler_->WaitingFor(done.id)) {
      Finish(id, FinishReason::kError, done.error, nullptr);
    }
  }
}

void Engine::Started(Sequence& sequence, double now) {
  if (sequence.queue_seconds >= 0) return;
  const Request& request = sequence.request;
  sequence.queue_seconds = std::max(0.0, now - request.submitted);
  if (request.adapter == 0) return;
  const double installed_at = adapters_.at(request.adapter).installed_at;
  if (installed_at <= request.submitted) return;
  ++stats_.adapter_waits;
  stats_.adapter_wait_seconds += installed_at - request.submitted;
}

void Engine::Measure(const StepBatch& batch, double seconds) {
  int32_t prefill = 0;
  for (const StepItem& item : batch.items) prefill += item.count > 1 ? item.count : 0;
  if (2 * prefill > batch.num_tokens) {
    const double one = seconds / batch.num_tokens;
    costs_.prefill_token_seconds += kNewest * (one - costs_.prefill_token_seconds);
  }
  scheduler_->SetCosts(costs_);
}

void Engine::Apply(const std::vector<AdapterChange>& changes, StepReport& report) {
  for (const AdapterChange& change : changes) {
    if (change.install) {
      installer_->Start(change.adapter, adapters_.at(change.adapter).source, change.pages,
                        change.pages.size() * stats_.page_bytes);
    } else {
      runner_->Evict(change.adapter);
      report.installs.emplace_back(change.adapter, false);
    }
  }
}

StepReport Engine::Step(double now) {
  StepReport report;
  TakeInstalled(now, report);
  for (const RequestId id : scheduler_->Expired(now)) {
    Finish(id, FinishReason::kError, Status(StatusCode::kDeadlineExceeded, "deadline: has passed"),
           nullptr);
  }
  const StepBatch batch = scheduler_->Schedule();
  Apply(batch.changes, report);
  for (const AdapterId id : scheduler_->TakeUnneeded()) installer_->GiveUp(id);
  ran_ = !batch.items.empty();
  installer_->SetDecoding(ran_);
  if (ran_) {
    for (const StepItem& item : batch.items) Started(*item.sequence, now);
    if (config_.record_steps) report.records.push_back(Describe(batch));
    std::vector<SampleResult> results = runner_->Run(batch);
    scheduler_->Computed(batch);
    Publish(batch, std::move(results));
    ++stats_.steps;
    for (const StepItem& item : batch.items) {
      if (item.count > 1 || !item.samples) {
        stats_.prompt_tokens += static_cast<uint64_t>(item.count);
      }
    }
    const double seconds = MonotonicSeconds() - now;
    stats_.step_seconds += seconds;
    Measure(batch, seconds);
    if (config_.record_steps) report.records.back().seconds = seconds;
  }
  report.outputs = std::exchange(pending_, {});
  for (const Scheduler::RemovedAdapter& removed : scheduler_->TakeRemoved()) {
    runner_->Evict(removed.id);
    adapters_.erase(removed.id);
    report.removed_adapters.push_back(removed.id);
  }
  return report;
}

EngineStats Engine::stats() const {
  EngineStats stats = stats_;
  const SchedulerCounters& counters = scheduler_->counters();
  stats.preemptions = counters.preemptions;
  stats.prefix_hit_tokens = counters.prefix_hit_tokens;
  stats.adapter_evictions = counters.evictions;
  stats.running = scheduler_->num_running();
  stats.waiting = scheduler_->num_waiting();
  const PageArena& arena = scheduler_->arena();
  stats.pages_free = arena.count(PageUse::kFree);
  stats.pages_kv = arena.count(PageUse::kKv);
  stats.pages_adapter = arena.count(PageUse::kAdapter);
  stats.adapters_installed = scheduler_->adapters().num_installed();
  stats.adapters_installing = scheduler_->adapters().installing().size();
  const InstallReads reads = backend_->install_reads();
  stats.adapter_direct_bytes = reads.direct_bytes;
  stats.adapter_staged_bytes = reads.staged_bytes;
  stats.adapter_weight_bytes = runner_->adapter_weight_bytes();
  return stats;
}

}  // namespace loraserve
