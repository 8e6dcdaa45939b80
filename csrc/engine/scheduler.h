// Decides what each step computes: continuous batching with chunked prefill, prefix cache,
// preemption by recompute and one queue for each adapter.
//
// Never touches a device. Not thread-safe: one owner, the engine.
//
// Order among requests: higher priority first, then arrival. A waiting request whose adapter cannot
// be installed now does not hold up requests of other adapters; one that only lacks KV pages does,
// so that a long prompt is not starved by short ones.
//
// Nobody starves: a request before which everyone who waited when it came and `max_overtakes` more
// were admitted is promoted. It then goes before all others and holds them up until what runs has
// ended and given it room; that an empty engine has room for it is what Add() makes sure of.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <unordered_map>
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
  // Installations in one step and their bytes (0: no limit; a single adapter always fits), so that
  // a burst of cold adapters cannot stall decoding.
  int32_t max_step_installs = 4;
  uint64_t max_step_install_bytes = 32 << 20;
  // Later requests that may be admitted before a waiting one, whether for their priority or because
  // its adapter found no room. About one batch: less would idle the engine for large adapters.
  int32_t max_overtakes = 64;
  bool prefix_cache = true;
};

struct SchedulerCounters {
  uint64_t preemptions = 0;
  uint64_t prefix_hit_tokens = 0;
  uint64_t installs = 0;
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
  // No new requests for it from now on. Removed() lists it once its last request has ended.
  Status RemoveAdapter(AdapterId id);
  // Adapters removed since the last call; `installed` ones had pages.
  struct RemovedAdapter {
    AdapterId id;
    bool installed;
  };
  std::vector<RemovedAdapter> TakeRemoved();

  // kNotFound or kUnavailable if the adapter is unknown or draining; kResourceExhausted if the
  // request could not run even alone.
  Status Add(std::unique_ptr<Sequence> sequence);
  // Takes a sequence out, running or waiting; null if there is none. Its pages are given back.
  std::unique_ptr<Sequence> Take(RequestId id);
  Sequence* Find(RequestId id);
  // Ids of unfinished sequences whose deadline is before `now`.
  std::vector<RequestId> Expired(double now) const;

  // Empty if nothing can run.
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
  static Order OrderOf(const Sequence& sequence) {
    if (sequence.promoted) return {INT64_MIN, sequence.arrival};
    return {-int64_t{sequence.request.priority}, sequence.arrival};
  }

  void ScheduleRunning(StepBatch& batch);
  void Admit(StepBatch& batch);
  enum class Admission { kAdmitted, kNoAdapter, kNoPages };
  Admission TryAdmit(Sequence& sequence, StepBatch& batch);
  bool AdapterFitsStep(AdapterId id) const;
  bool InstallAdapter(AdapterId id, StepBatch& batch);
  bool MakeRoom(uint32_t pages, StepBatch& batch);
  bool GrowBlocks(Sequence& sequence, int32_t tokens, StepBatch& batch);
  void MatchPrefix(Sequence& sequence);
  void CachePrefix(Sequence& sequence);
  void Preempt(Sequence& sequence, StepBatch& batch);
  void StopRunning(Sequence& sequence);
  void Enqueue(Sequence* sequence);
  void Dequeue(Sequence* sequence);
  void PromoteOvertaken();
  void AddItem(Sequence& sequence, int32_t count, StepBatch& batch);

  SchedulerConfig config_;
  PageArena arena_;
  BlockPool blocks_;
  PrefixCache cache_;
  AdapterResidency adapters_;
  std::unordered_map<RequestId, std::unique_ptr<Sequence>> sequences_;
  std::map<Order, Sequence*> running_;
  std::map<AdapterId, std::map<Order, Sequence*>> waiting_;  // no empty queues
  std::set<std::pair<uint64_t, RequestId>> not_promoted_;    // (overtaken_at, id) of waiting ones
  std::vector<RemovedAdapter> removed_;
  SchedulerCounters counters_;
  uint64_t arrivals_ = 0;
  uint64_t admissions_ = 0;
  uint64_t step_ = 0;  // the clock of least-recent use
};

}  // namespace loraserve
