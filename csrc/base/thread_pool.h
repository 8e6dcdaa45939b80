// A fixed set of threads that run one function at a time, for the inner loops of a backend.
//
// A call is cut into as many shares as there are threads, and whoever is awake takes the next. So a
// worker that the system does not run at the moment, because others use its core, holds nothing up:
// the caller does its share too.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace loraserve {

// Run and ParallelFor are called from one thread at a time, and never from inside each other.
class ThreadPool {
 public:
  // `threads` includes the caller's own; at least 1.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls function(share) once for each share in [0, size()); returns when all have returned. A
  // share may index scratch memory: no two threads have the same one at a time.
  template <class Function>
  void Run(Function&& function) {
    if (workers_.empty()) return function(0);
    RunErased([](void* context,
                 int share) { (*static_cast<std::remove_reference_t<Function>*>(context))(share); },
              const_cast<void*>(static_cast<const void*>(&function)));
  }

  // Calls function(task, share) once for each task in [0, tasks), in any order; `share` as in Run.
  template <class Function>
  void ParallelFor(int64_t tasks, Function&& function) {
    if (workers_.empty() || tasks <= 1) {
      for (int64_t task = 0; task < tasks; ++task) function(task, 0);
      return;
    }
    std::atomic<int64_t> next{0};
    Run([&](int share) {
      for (int64_t task = next.fetch_add(1, std::memory_order_relaxed); task < tasks;
           task = next.fetch_add(1, std::memory_order_relaxed)) {
        function(task, share);
      }
    });
  }

 private:
  using Erased = void (*)(void* context, int share);
  void RunErased(Erased function, void* context);
  void RunShares(uint32_t generation);
  void Loop();

  std::vector<std::thread> workers_;
  Erased function_ = nullptr;
  void* context_ = nullptr;
  std::atomic<uint32_t> generation_{0};  // one more for every Run
  std::atomic<uint64_t> next_share_{0};  // generation << 32 | share that nobody has taken
  std::atomic<uint32_t> finished_{0};    // shares of this generation
  std::atomic<bool> stop_{false};
};

}  // namespace loraserve
