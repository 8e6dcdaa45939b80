// Which waiting requests come into a step, and whose adapters are brought into pages for them.
#include <algorithm>

#include "base/check.h"
#include "engine/scheduler.h"

namespace loraserve {

void Scheduler::Admit(StepBatch& batch) {
  PromoteOvertaken();
  lacking_ = UINT64_MAX;
  // Heads of the queues, in the order of their requests; and adapters that admit nobody.
  std::map<Order, AdapterId> heads;
  std::set<AdapterId> closed;
  for (const auto& [adapter, queue] : waiting_) heads.emplace(queue.begin()->first, adapter);
  while (!heads.empty() && static_cast<int32_t>(running_.size()) < config_.max_sequences &&
         batch.num_tokens < config_.max_batch_tokens) {
    const auto [order, adapter] = *heads.begin();
    heads.erase(heads.begin());
    if (closed.count(adapter) > 0) continue;
    Sequence* const sequence = waiting_.at(adapter).begin()->second;
    const Admission admission = TryAdmit(*sequence, batch);
    if (admission == Admission::kNoPages) return;
    if (admission != Admission::kAdmitted) {
      if (sequence->promoted) return;
      const int32_t left = config_.max_overtakes - config_.max_overtakes / 4;
      const bool due = admissions_ + static_cast<uint64_t>(left) >= sequence->overtaken_at;
      if (admission == Admission::kNoRoom && due) CloseFor(*sequence, closed);
      continue;
    }
    const auto queue = waiting_.find(adapter);
    if (queue == waiting_.end()) continue;
    const Order next = queue->second.begin()->first;
    // The others of an adapter follow the first of them, within their priority.
    heads.emplace(adapter != 0 && next.first == order.first ? order : next, adapter);
  }
  // For those that find no place in this step, so that they need not wait again when they do.
  for (const auto& [order, adapter] : heads) {
    if (adapter == 0 || adapters_.entry(adapter).state != AdapterResidency::State::kHost) continue;
    StartInstall(*waiting_.at(adapter).begin()->second, batch);
  }
}

uint64_t Scheduler::BeyondStep(AdapterId id) const {
  const AdapterResidency::Entry& entry = adapters_.entry(id);
  if (config_.max_step_adapter_bytes == 0 || entry.pins > 0) return 0;
  if (adapters_.pinned_bytes() == 0) return 0;  // alone, any adapter may run
  const uint64_t bytes = adapters_.pinned_bytes() + entry.bytes;
  return bytes - std::min(bytes, config_.max_step_adapter_bytes);
}

bool Scheduler::MayInstall(uint64_t bytes) const {
  uint64_t sum = bytes;
  uint64_t largest = bytes;
  for (const auto& [id, other] : adapters_.installing()) {
    sum += other;
    largest = std::max(largest, other);
  }
  return sum - largest <= config_.max_install_bytes;
}

void Scheduler::BeginInstall(AdapterId id, StepBatch& batch) {
  batch.changes.push_back({.adapter = id, .install = true, .pages = adapters_.StartInstall(id)});
}

bool Scheduler::StartInstall(const Sequence& sequence, StepBatch& batch) {
  const AdapterId id = sequence.request.adapter;
  const AdapterResidency::Entry& entry = adapters_.entry(id);
  if (!MayInstall(entry.bytes)) return true;
  // In vain if the sequence could not run then for lack of KV pages.
  const uint64_t needed = uint64_t{entry.pages_needed} + PagesFor(sequence.num_tokens());
  if (needed >= lacking_) return false;
  const Order order = OrderOf(sequence);
  if (ReachablePages(order) < needed) {
    lacking_ = needed;
    return false;
  }
  LS_CHECK(MakeRoom(entry.pages_needed, order, batch));
  BeginInstall(id, batch);
  return true;
}

void Scheduler::Prefetch(AdapterId id, bool evict) {
  if (adapters_.Contains(id)) prefetch_.emplace_back(id, evict);
}

void Scheduler::StartPrefetch(StepBatch& batch) {
  while (!prefetch_.empty()) {
    const auto [id, evict] = prefetch_.front();
    prefetch_.pop_front();
    if (!adapters_.Contains(id)) continue;
    const AdapterResidency::Entry& entry = adapters_.entry(id);
    if (entry.draining || entry.state != AdapterResidency::State::kHost) continue;
    if (!evict && arena_.count(PageUse::kFree) < entry.pages_needed) continue;
    if (!MakeRoom(entry.pages_needed, kNobody, batch)) continue;
    return BeginInstall(id, batch);
  }
}

void Scheduler::CloseFor(const Sequence& sequence, std::set<AdapterId>& closed) const {
  // No more than can be on their way in at a time.
  uint64_t closing = 0;
  for (const AdapterId id : closed) closing += adapters_.entry(id).bytes;
  if (!closed.empty() && closing >= config_.max_install_bytes) return;
  const AdapterId wanted = sequence.request.adapter;
  const AdapterResidency::Entry& entry = adapters_.entry(wanted);
  uint64_t missing = BeyondStep(wanted);
  if (!entry.installed()) {
    const uint64_t needed = entry.pages_needed + PagesFor(sequence.num_tokens());
    const uint64_t reachable = ReachablePages(OrderOf(sequence));
    missing = std::max(missing, (needed - std::min(needed, reachable)) * arena_.page_bytes());
  }
  std::set<std::pair<uint32_t, AdapterId>> in_use;  // by their running sequences
  for (const auto& [key, running] : running_) {
    const AdapterId id = running->request.adapter;
    if (id != 0 && closed.count(id) == 0) in_use.emplace(adapters_.entry(id).pins, id);
  }
  for (const auto& [pins, id] : in_use) {
    if (missing == 0) return;
    closed.insert(id);
    missing -= std::min(missing, adapters_.entry(id).bytes);
  }
}

Scheduler::Admission Scheduler::TryAdmit(Sequence& sequence, StepBatch& batch) {
  const AdapterId adapter = sequence.request.adapter;
  if (adapter != 0) {
    const AdapterResidency::State state = adapters_.entry(adapter).state;
    if (state == AdapterResidency::State::kHost && !StartInstall(sequence, batch)) {
      return Admission::kNoRoom;
    }
    if (state != AdapterResidency::State::kInstalled) return Admission::kInstalling;
    if (BeyondStep(adapter) > 0) return Admission::kNoRoom;
    adapters_.Pin(adapter);
  }
  MatchPrefix(sequence);
  const int32_t count = std::min(sequence.remaining(), config_.max_batch_tokens - batch.num_tokens);
  // The whole of its tokens must find room, not only the first chunk, or two long prompts would
  // preempt each other in turn.
  if (!GrowBlocks(sequence, sequence.num_tokens(), batch)) {
    StopRunning(sequence);
    return Admission::kNoPages;
  }
  Dequeue(&sequence);
  ++admissions_;
  sequence.running = true;
  running_.emplace(OrderOf(sequence), &sequence);
  if (!sequence.admitted_once) {
    sequence.admitted_once = true;
    sequence.cached_tokens = sequence.computed;
  }
  counters_.prefix_hit_tokens += static_cast<uint64_t>(sequence.computed);
  AddItem(sequence, count, batch);
  return Admission::kAdmitted;
}

std::vector<AdapterId> Scheduler::SparedBehind(Order order) const {
  std::vector<std::pair<Order, AdapterId>> spared;
  for (const AdapterId id : adapters_.spared()) {
    const Order head = waiting_.at(id).begin()->first;
    if (head > order) spared.emplace_back(head, id);
  }
  std::sort(spared.rbegin(), spared.rend());
  std::vector<AdapterId> ids;
  ids.reserve(spared.size());
  for (const auto& [head, id] : spared) ids.push_back(id);
  return ids;
}

uint64_t Scheduler::ReachablePages(Order order) const {
  uint64_t reachable = uint64_t{arena_.count(PageUse::kFree)} + adapters_.evictable_pages() +
                       uint64_t{cache_.evictable()} * blocks_.pages_per_block();
  for (const AdapterId id : SparedBehind(order)) reachable += adapters_.entry(id).pages_needed;
  return reachable;
}

void Scheduler::EvictAdapter(AdapterId id, StepBatch& batch) {
  adapters_.Evict(id);
  batch.changes.push_back({.adapter = id, .install = false, .pages = {}});
  ++counters_.evictions;
}

bool Scheduler::MakeRoom(uint32_t pages, Order order, StepBatch& batch) {
  if (arena_.count(PageUse::kFree) >= pages) return true;
  if (ReachablePages(order) < pages) return false;  // do not evict in vain
  while (arena_.count(PageUse::kFree) < pages) {
    const std::optional<EvictionKey> block = cache_.NextKey();
    const auto adapter = adapters_.NextToEvict();
    // Of two that are worth the same, the block.
    if (block && (!adapter || *block <= adapter->first)) {
      cache_.Evict();
    } else if (adapter) {
      EvictAdapter(adapter->second, batch);
    } else {
      EvictAdapter(SparedBehind(order).front(), batch);
    }
  }
  return true;
}

}  // namespace loraserve
