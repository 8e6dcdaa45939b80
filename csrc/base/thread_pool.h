// A fixed set of threads that run one function at a time, for the inner loops of a backend.
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

  // Calls function(worker) once for each worker in [0, size()); returns when all have returned.
  template <class Function>
  void Run(Function&& function) {
    if (workers_.empty()) return function(0);
    RunErased(
        [](void* context, int worker) {
          (*static_cast<std::remove_reference_t<Function>*>(context))(worker);
        },
        const_cast<void*>(static_cast<const void*>(&function)));
  }

  // Calls function(task, worker) once for each task in [0, tasks), in any order.
  template <class Function>
  void ParallelFor(int64_t tasks, Function&& function) {
    if (workers_.empty() || tasks <= 1) {
      for (int64_t task = 0; task < tasks; ++task) function(task, 0);
      return;
    }
    std::atomic<int64_t> next{0};
    Run([&](int worker) {
      for (int64_t task = next.fetch_add(1, std::memory_order_relaxed); task < tasks;
           task = next.fetch_add(1, std::memory_order_relaxed)) {
        function(task, worker);
      }
    });
  }

 private:
  using Erased = void (*)(void* context, int worker);
  void RunErased(Erased function, void* context);
  void Loop(int worker);

  std::vector<std::thread> workers_;
  Erased function_ = nullptr;
  void* context_ = nullptr;
  std::atomic<uint32_t> generation_{0};  // one more for every Run
  std::atomic<uint32_t> running_{0};     // workers that have not finished this generation
  std::atomic<bool> stop_{false};
};

}  // namespace loraserve
