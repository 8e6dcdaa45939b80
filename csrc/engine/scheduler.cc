#include "engine/scheduler.h"

#include <algorithm>

#include "base/check.h"

namespace loraserve {

// Invariants: a sequence is in running_ or in exactly one queue of waiting_, and there in
// not_promoted_ too unless it is promoted. A waiting sequence holds no blocks and no pin; its
// adapter is wanted. A running one uses its cache root and pins its adapter, which is installed.

Scheduler::Scheduler(const SchedulerConfig& config, PageArena arena)
    : config_(config),
      arena_(std::move(arena)),
      blocks_(&arena_, config.pages_per_block),
      cache_(&blocks_, &eviction_order_, config.block_size),
      adapters_(&arena_, &eviction_order_) {}

void Scheduler::SetCosts(const EvictionCosts& costs) {
  cache_.SetCost(costs.prefill_token_seconds * config_.block_size / blocks_.pages_per_block());
  adapters_.SetCost(costs.install_seconds, costs.install_byte_seconds);
}

uint32_t Scheduler::PagesFor(int64_t tokens) const {
  const int64_t blocks = (tokens + config_.block_size - 1) / config_.block_size;
  return static_cast<uint32_t>(blocks) * config_.pages_per_block;
}

Status Scheduler::AddAdapter(AdapterId id, uint32_t pages, uint64_t bytes) {
  return adapters_.Add(id, pages, bytes);
}

Status Scheduler::RemoveAdapter(AdapterId id) {
  if (!adapters_.Contains(id)) {
    return Status(StatusCode::kNotFound, "adapter: id " + std::to_string(id) + " is not loaded");
  }
  adapters_.StartDraining(id);
  RemoveIfIdle(id);
  return Status();
}

void Scheduler::RemoveIfIdle(AdapterId id) {
  const AdapterResidency::Entry& entry = adapters_.entry(id);
  if (!entry.draining) return;
  if (adapters_.Idle(id)) {
    removed_.push_back({id, adapters_.Remove(id)});
  } else if (entry.requests == 0) {
    unneeded_.push_back(id);
  }
}

void Scheduler::EndInstall(AdapterId id, bool complete) {
  adapters_.EndInstall(id, complete, step_);
  RemoveIfIdle(id);
}

std::vector<Scheduler::RemovedAdapter> Scheduler::TakeRemoved() {
  return std::exchange(removed_, {});
}

Status Scheduler::Add(std::unique_ptr<Sequence> sequence) {
  const AdapterId adapter = sequence->request.adapter;
  if (sequences_.count(sequence->request.id) > 0) {
    return Status(StatusCode::kAlreadyExists, "request_id: is in use");
  }
  const Request& request = sequence->request;
  uint64_t pages =
      PagesFor(static_cast<int64_t>(request.prompt.size()) + request.params.max_tokens);
  if (adapter != 0) {
    if (!adapters_.Contains(adapter)) {
      return Status(StatusCode::kNotFound, "adapter: is not loaded");
    }
    const AdapterResidency::Entry& entry = adapters_.entry(adapter);
    if (entry.draining) return Status(StatusCode::kUnavailable, "adapter: is being unloaded");
    pages += entry.pages_needed;
  }
  if (pages > arena_.num_pages()) {  // so that a sequence alone always fits
    return Status(StatusCode::kResourceExhausted,
                  "prompt: prompt, max_tokens and adapter need " + std::to_string(pages) +
                      " pages, the engine has " + std::to_string(arena_.num_pages()));
  }
  if (adapter != 0) adapters_.AddRequest(adapter);
  sequence->arrival = arrivals_++;
  if (request.deadline > 0) deadlines_.emplace(request.deadline, request.id);
  Sequence* const added = sequence.get();
  sequences_.emplace(added->request.id, std::move(sequence));
  Enqueue(added);
  return Status();
}

void Scheduler::Enqueue(Sequence* sequence) {
  const AdapterId adapter = sequence->request.adapter;
  waiting_[adapter].emplace(OrderOf(*sequence), sequence);
  if (adapter != 0) adapters_.SetWanted(adapter, true);
  if (sequence->promoted) return;
  sequence->overtaken_at =
      admissions_ + num_waiting() + static_cast<uint64_t>(config_.max_overtakes);
  not_promoted_.emplace(sequence->overtaken_at, sequence->request.id);
}

void Scheduler::Dequeue(Sequence* sequence) {
  const AdapterId adapter = sequence->request.adapter;
  const auto queue = waiting_.find(adapter);
  queue->second.erase(OrderOf(*sequence));
  if (queue->second.empty()) {
    waiting_.erase(queue);
    if (adapter != 0) adapters_.SetWanted(adapter, false);
  }
  not_promoted_.erase({sequence->overtaken_at, sequence->request.id});
}

void Scheduler::PromoteOvertaken() {
  while (!not_promoted_.empty() && not_promoted_.begin()->first <= admissions_) {
    Sequence* const sequence = Find(not_promoted_.begin()->second);
    Dequeue(sequence);
    sequence->promoted = true;
    Enqueue(sequence);
  }
}

Sequence* Scheduler::Find(RequestId id) {
  const auto found = sequences_.find(id);
  return found == sequences_.end() ? nullptr : found->second.get();
}

std::unique_ptr<Sequence> Scheduler::Take(RequestId id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return nullptr;
  std::unique_ptr<Sequence> sequence = std::move(found->second);
  sequences_.erase(found);
  deadlines_.erase({sequence->request.deadline, id});
  const AdapterId adapter = sequence->request.adapter;
  if (sequence->running) {
    StopRunning(*sequence);
  } else {
    Dequeue(sequence.get());
  }
  if (adapter != 0) {
    adapters_.EndRequest(adapter);
    RemoveIfIdle(adapter);
  }
  return sequence;
}

std::vector<RequestId> Scheduler::Expired(double now) const {
  std::vector<RequestId> expired;
  for (const auto& [deadline, id] : deadlines_) {
    if (deadline > now) break;
    expired.push_back(id);
  }
  return expired;
}

std::vector<RequestId> Scheduler::WaitingFor(AdapterId id) const {
  std::vector<RequestId> waiting;
  const auto queue = waiting_.find(id);
  if (queue == waiting_.end()) return waiting;
  for (const auto& [order, sequence] : queue->second) waiting.push_back(sequence->request.id);
  return waiting;
}

double Scheduler::NextDeadline() const {
  return deadlines_.empty() ? 0 : deadlines_.begin()->first;
}

void Scheduler::StopRunning(Sequence& sequence) {
  running_.erase(OrderOf(sequence));
  // Children before parents: the last blocks of a prompt are the least likely to be asked for.
  for (auto block = sequence.blocks.rbegin(); block != sequence.blocks.rend(); ++block) {
    if (block->node == PrefixCache::kNone) {
      blocks_.Free(block->id);
    } else {
      cache_.Release(block->node, step_);
    }
  }
  sequence.blocks.clear();
  if (sequence.root != PrefixCache::kNone) cache_.Release(sequence.root, step_);
  sequence.root = PrefixCache::kNone;
  if (sequence.request.adapter != 0) adapters_.Unpin(sequence.request.adapter, step_);
  sequence.running = false;
  sequence.computed = 0;
}

void Scheduler::Preempt(Sequence& sequence, StepBatch& batch) {
  const auto item =
      std::find_if(batch.items.begin(), batch.items.end(),
                   [&](const StepItem& candidate) { return candidate.sequence == &sequence; });
  if (item != batch.items.end()) {
    batch.num_tokens -= item->count;
    batch.items.erase(item);
  }
  StopRunning(sequence);
  Enqueue(&sequence);
  ++counters_.preemptions;
}

bool Scheduler::GrowBlocks(Sequence& sequence, int32_t tokens, StepBatch& batch) {
  const size_t wanted = static_cast<size_t>((tokens + config_.block_size - 1) / config_.block_size);
  if (sequence.blocks.size() >= wanted) return true;
  const size_t missing = wanted - sequence.blocks.size();
  const Order order = sequence.running ? kRunning : OrderOf(sequence);
  if (!MakeRoom(static_cast<uint32_t>(missing) * blocks_.pages_per_block(), order, batch)) {
    return false;
  }
  while (sequence.blocks.size() < wanted) {
    const std::optional<BlockId> block = blocks_.Allocate();
    LS_CHECK(block.has_value());
    sequence.blocks.push_back({.id = *block, .node = PrefixCache::kNone});
  }
  return true;
}

void Scheduler::AddItem(Sequence& sequence, int32_t count, StepBatch& batch) {
  batch.items.push_back({.sequence = &sequence,
                         .begin = sequence.computed,
                         .count = count,
                         .samples = sequence.computed + count == sequence.num_tokens()});
  batch.num_tokens += count;
}

StepBatch Scheduler::Schedule() {
  ++step_;
  StepBatch batch;
  const uint64_t preemptions = counters_.preemptions;
  ScheduleRunning(batch);
  // A step that had to preempt has no pages to give to newcomers.
  if (counters_.preemptions == preemptions) Admit(batch);
  if (adapters_.installing().empty()) StartPrefetch(batch);
  // Or what waits would wait for ever.
  LS_CHECK(!batch.items.empty() || sequences_.empty() || !adapters_.installing().empty());
  return batch;
}

void Scheduler::ScheduleRunning(StepBatch& batch) {
  // Decodes first: they cost one token each and their users wait for every one of them.
  std::vector<Sequence*> decodes;
  std::vector<Sequence*> prefills;
  decodes.reserve(running_.size());
  for (const auto& [key, sequence] : running_) {
    (sequence->remaining() == 1 ? decodes : prefills).push_back(sequence);
  }
  batch.items.reserve(running_.size());
  for (const auto* order : {&decodes, &prefills}) {
    for (Sequence* sequence : *order) {
      if (!sequence->running) continue;  // preempted a moment ago
      const int32_t count =
          std::min(sequence->remaining(), config_.max_batch_tokens - batch.num_tokens);
      if (count <= 0) break;
      bool grown = GrowBlocks(*sequence, sequence->computed + count, batch);
      while (!grown && running_.size() > 1) {
        Sequence* const victim = running_.rbegin()->second;
        Preempt(*victim, batch);
        if (victim == sequence) break;
        grown = GrowBlocks(*sequence, sequence->computed + count, batch);
      }
      // Alone, a sequence always fits, as Add() refuses what the arena cannot hold, but for pages
      // that are being written now: it goes on when that has ended.
      if (grown) AddItem(*sequence, count, batch);
    }
  }
}

void Scheduler::MatchPrefix(Sequence& sequence) {
  if (!config_.prefix_cache) return;
  sequence.root = cache_.Root(sequence.request.cache_namespace);
  cache_.Use(sequence.root);
  // Logprobs of the prompt need every position computed.
  if (sequence.request.params.prompt_logprobs && sequence.num_output() == 0) return;
  const std::span<const int32_t> tokens(sequence.tokens);
  const auto size = static_cast<size_t>(config_.block_size);
  PrefixCache::NodeId node = sequence.root;
  // The last token is always computed: its logits are wanted.
  for (size_t at = 0; at + size < tokens.size(); at += size) {
    node = cache_.Find(node, tokens.subspan(at, size));
    if (node == PrefixCache::kNone) break;
    cache_.Use(node);
    sequence.blocks.push_back({.id = cache_.block(node), .node = node});
    sequence.computed += config_.block_size;
  }
}

void Scheduler::CachePrefix(Sequence& sequence) {
  if (sequence.root == PrefixCache::kNone) return;
  const std::span<const int32_t> tokens(sequence.tokens);
  const auto size = static_cast<size_t>(config_.block_size);
  const size_t full = static_cast<size_t>(sequence.computed) / size;
  // Cached blocks come first; from the end, as in most steps there is no other.
  size_t cached = full;
  while (cached > 0 && sequence.blocks[cached - 1].node == PrefixCache::kNone) --cached;
  for (size_t i = cached; i < full; ++i) {
    Sequence::Block& block = sequence.blocks[i];
    const PrefixCache::NodeId parent = i == 0 ? sequence.root : sequence.blocks[i - 1].node;
    const PrefixCache::NodeId twin = cache_.Find(parent, tokens.subspan(i * size, size));
    if (twin == PrefixCache::kNone) {
      block.node = cache_.Insert(parent, tokens.subspan(i * size, size), block.id);
    } else {  // another sequence computed the same block meanwhile: share it
      cache_.Use(twin);
      blocks_.Free(block.id);
      block = {.id = cache_.block(twin), .node = twin};
    }
  }
}

void Scheduler::Computed(const StepBatch& batch) {
  for (const StepItem& item : batch.items) {
    item.sequence->computed = item.begin + item.count;
    CachePrefix(*item.sequence);
  }
}

}  // namespace loraserve
