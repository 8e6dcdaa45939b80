// Decides what each step computes: continuous batching with chunked prefill, prefix cache,
// preemption by recompute and one queue for each adapter.
//
// Never touches a device. Not thread-safe: one owner, the engine.
//
// Order among requests: higher priority first, then arrival. A waiting request whose adapter is
// being installed, or cannot be now, does not hold up requests of other adapters; one that only
// lacks KV pages does, so that a long prompt is not starved by short ones.
//
// Requests of one adapter are admitted together where one of them is next, so that an adapter that
// is read, or was brought in, serves as many as it can; they overtake others within the bound
// above. Where more adapters are wanted than fit, they take turns: a request that was overtaken by
// a quarter of the bound closes adapters that are in use, those with the fewest running sequences.
// A closed one admits nobody, and makes way when its last sequence ends. Nothing that runs is
// stopped.
//
// Adapters are installed beside the steps: Schedule() reserves the pages and says what to write,
// EndInstall() says that it is done, and the requests that wait for it can run from then on. An
// adapter that was installed for a request stays until that has run, unless a running sequence or
// a request that goes before it needs the pages.
//
// Nobody starves: a request before which everyone who waited when it came and `max_overtakes` more
// were admitted is promoted. It then goes before all others and holds them up until what runs has
// ended and given it room; that an empty engine has room for it is what Add() makes sure of.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/step_batch.h"
#include "kv/block_pool.h"
#include "kv/prefix_cache.h"
#include "lora/residency.h"
#include "memory/page_arena.h"

namespace loraserve {

struct SchedulerConfig {
  int32_t block_size = 16;
  uint32_t pages_per_block = 1;
  int32_t max_batch_tokens = 512;
  int32_t max_sequences = 64;
  // Distinct adapter bytes that the running sequences may touch in one step; 0: no limit. In decode
  // the cost of a step follows them. A single adapter always fits.
  uint64_t max_step_adapter_bytes = 0;
  // Bytes of adapters that may be on their way into pages at a time, the largest of them left out:
  // what is being installed takes pages and serves nobody yet.
  uint64_t max_install_bytes = 64 << 20;
  // Later requests that may be admitted before a waiting one, whether for their priority or because
  // its adapter found no room. About one batch: less would idle the engine for large adapters.
  int32_t max_overtakes = 64;
  bool prefix_cache = true;
};

struct EvictionCosts {
  double prefill_token_seconds = 0;
  double install_seconds = 0;       // of any adapter
  double install_byte_seconds = 0;  // and for each byte that it takes in pages
};

struct SchedulerCounters {
  uint64_t preemptions = 0;
  uint64_t prefix_hit_tokens = 0;
  uint64_t evictions = 0;  // of adapters
};

class Scheduler {
 public:
  Scheduler(const SchedulerConfig& config, PageArena arena);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Pages that `tokens` positions take.
  uint32_t PagesFor(int64_t tokens) const;

  Status AddAdapter(AdapterId id, uint32_t pages, uint64_t bytes);
  // No new requests for it from now on. TakeRemoved() lists it once its last request has ended and
  // nothing is being written into its pages.
  Status RemoveAdapter(AdapterId id);
  // Adapters removed since the last call; `installed` ones had pages.
  struct RemovedAdapter {
    AdapterId id;
    bool installed;
  };
  std::vector<RemovedAdapter> TakeRemoved();
  // Brings the adapter into pages before anybody asks for it, when nothing that is asked for is
  // under way: into free pages only, or also in the place of what would be evicted next. Forgotten
  // where there is no such place.
  void Prefetch(AdapterId id, bool evict);
  // Seconds to bring things back, as measured: what eviction goes by. Until the first call, 0: the
  // longest unused goes first.
  void SetCosts(const EvictionCosts& costs);

  // An installation that Schedule() began has ended: the adapter is in its pages, or was given up.
  void EndInstall(AdapterId id, bool complete);
  // Adapters whose installation nobody needs any more, since the last call. EndInstall() is awaited
  // for them all the same.
  std::vector<AdapterId> TakeUnneeded() { return std::exchange(unneeded_, {}); }

  // kNotFound or kUnavailable if the adapter is unknown or draining; kResourceExhausted if the
  // request could not run even alone.
  Status Add(std::unique_ptr<Sequence> sequence);
  // Takes a sequence out, running or waiting; null if there is none. Its pages are given back.
  std::unique_ptr<Sequence> Take(RequestId id);
  Sequence* Find(RequestId id);
  // Ids of unfinished sequences whose deadline is before `now`, the earliest first.
  std::vector<RequestId> Expired(double now) const;
  // Those in the queue of an adapter, in order.
  std::vector<RequestId> WaitingFor(AdapterId id) const;
  // The earliest deadline of an unfinished sequence; 0: none has one.
  double NextDeadline() const;

  // Without items if nothing can run: what waits then waits for an EndInstall().
  StepBatch Schedule();
  // The step ran: its positions are in the cache now. Appending sampled tokens is the caller's.
  void Computed(const StepBatch& batch);

  bool HasWork() const { return !sequences_.empty(); }
  size_t num_running() const { return running_.size(); }
  size_t num_waiting() const { return sequences_.size() - running_.size(); }
  const PageArena& arena() const { return arena_; }
  const BlockPool& blocks() const { return blocks_; }
  const AdapterResidency& adapters() const { return adapters_; }
  const SchedulerCounters& counters() const { return counters_; }

 private:
  using Order = std::pair<int64_t, uint64_t>;  // (-priority, arrival): smaller goes first
  // Running sequences go before all that wait, prefetches behind.
  static constexpr Order kRunning = {INT64_MIN, 0};
  static constexpr Order kNobody = {INT64_MAX, UINT64_MAX};
  static Order OrderOf(const Sequence& sequence) {
    if (sequence.promoted) return {INT64_MIN, sequence.arrival};
    return {-int64_t{sequence.request.priority}, sequence.arrival};
  }

  void ScheduleRunning(StepBatch& batch);
  void Admit(StepBatch& batch);
  // kInstalling: or not begun, as others are under way. kNoRoom: no pages for its adapter, or none
  // left of max_step_adapter_bytes.
  enum class Admission { kAdmitted, kInstalling, kNoRoom, kNoPages };
  Admission TryAdmit(Sequence& sequence, StepBatch& batch);
  // Bytes by which the adapter would exceed max_step_adapter_bytes.
  uint64_t BeyondStep(AdapterId id) const;
  bool MayInstall(uint64_t bytes) const;
  // False if there are no pages for it.
  bool StartInstall(const Sequence& sequence, StepBatch& batch);
  void BeginInstall(AdapterId id, StepBatch& batch);
  void StartPrefetch(StepBatch& batch);
  // Adds to `closed` what lets the sequence's adapter in once it has ended.
  void CloseFor(const Sequence& sequence, std::set<AdapterId>& closed) const;
  // Pages that are free or could be, for a sequence of this order.
  uint64_t ReachablePages(Order order) const;
  // Adapters that are kept for requests which wait behind `order`, the last in order first.
  std::vector<AdapterId> SparedBehind(Order order) const;
  bool MakeRoom(uint32_t pages, Order order, StepBatch& batch);
  void EvictAdapter(AdapterId id, StepBatch& batch);
  bool GrowBlocks(Sequence& sequence, int32_t tokens, StepBatch& batch);
  void MatchPrefix(Sequence& sequence);
  void CachePrefix(Sequence& sequence);
  void Preempt(Sequence& sequence, StepBatch& batch);
  void StopRunning(Sequence& sequence);
  void Enqueue(Sequence* sequence);
  void Dequeue(Sequence* sequence);
  void PromoteOvertaken();
  void AddItem(Sequence& sequence, int32_t count, StepBatch& batch);
  // Drops a draining adapter that nothing needs any more.
  void RemoveIfIdle(AdapterId id);

  SchedulerConfig config_;
  PageArena arena_;
  BlockPool blocks_;
  EvictionOrder eviction_order_;
  PrefixCache cache_;
  AdapterResidency adapters_;
  std::unordered_map<RequestId, std::unique_ptr<Sequence>> sequences_;
  std::map<Order, Sequence*> running_;
  std::map<AdapterId, std::map<Order, Sequence*>> waiting_;  // no empty queues
  std::set<std::pair<uint64_t, RequestId>> not_promoted_;    // (overtaken_at, id) of waiting ones
  std::set<std::pair<double, RequestId>> deadlines_;         // of those that have one
  std::vector<RemovedAdapter> removed_;
  std::vector<AdapterId> unneeded_;
  std::deque<std::pair<AdapterId, bool>> prefetch_;  // and whether something may be evicted for it
  // Of the heads looked at in this step, the least that one could not have: who goes after it and
  // needs as much need not ask.
  uint64_t lacking_ = UINT64_MAX;
  SchedulerCounters counters_;
  uint64_t arrivals_ = 1;  // 0 is kRunning's
  uint64_t admissions_ = 0;
  uint64_t step_ = 0;  // the clock of least-recent use
};

}  // namespace loraserve
