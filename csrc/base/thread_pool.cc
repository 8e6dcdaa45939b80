#include "base/thread_pool.h"

namespace loraserve {

// Invariant: function_ and context_ are written only while no share of the former generation is
// claimed and unfinished. So whoever has claimed a share of a generation may read them.

namespace {

// Regions of a model step follow each other within microseconds, so a short spin saves a system
// call; after it the thread sleeps and leaves the core to others.
constexpr int kSpins = 4000;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void WaitWhileEquals(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    Pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int worker = 1; worker < threads; ++worker) {
    workers_.emplace_back([this] { Loop(); });
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::RunErased(Erased function, void* context) {
  const auto shares = static_cast<uint32_t>(size());
  function_ = function;
  context_ = context;
  finished_.store(0, std::memory_order_relaxed);
  const uint32_t generation = generation_.load(std::memory_order_relaxed) + 1;
  next_share_.store(uint64_t{generation} << 32, std::memory_order_release);
  generation_.store(generation, std::memory_order_release);
  generation_.notify_all();
  RunShares(generation);
  for (uint32_t done = finished_.load(std::memory_order_acquire); done != shares;
       done = finished_.load(std::memory_order_acquire)) {
    WaitWhileEquals(finished_, done);
  }
}

void ThreadPool::RunShares(uint32_t generation) {
  const auto shares = static_cast<uint32_t>(size());
  uint64_t next = next_share_.load(std::memory_order_acquire);
  while (next >> 32 == generation && static_cast<uint32_t>(next) < shares) {
    if (!next_share_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
    function_(context_, static_cast<int>(static_cast<uint32_t>(next)));
    if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == shares) finished_.notify_one();
    next = next_share_.load(std::memory_order_acquire);
  }
}

void ThreadPool::Loop() {
  uint32_t seen = 0;
  for (;;) {
    WaitWhileEquals(generation_, seen);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load()) return;
    RunShares(seen);
  }
}

}  // namespace loraserve
