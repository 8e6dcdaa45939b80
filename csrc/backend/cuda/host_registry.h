// Host memory of others that the device copies from.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>

#include "backend/backend.h"
#include "backend/cuda/platform.h"

namespace loraserve {

// Any thread. What is left registered is given back at the end.
class HostRegistry {
 public:
  HostRegistry() = default;
  ~HostRegistry();
  HostRegistry(const HostRegistry&) = delete;
  HostRegistry& operator=(const HostRegistry&) = delete;

  // As Backend::RegisterHostMemory and UnregisterHostMemory.
  Status Register(void* memory, uint64_t bytes);
  void Unregister(void* memory);
  // Whether all of it lies in one registered range.
  bool Holds(const void* memory, uint64_t bytes) const;

  void CountRead(bool direct, uint64_t bytes) {
    (direct ? direct_bytes_ : staged_bytes_).fetch_add(bytes, std::memory_order_relaxed);
  }
  InstallReads reads() const {
    return {.direct_bytes = direct_bytes_.load(std::memory_order_relaxed),
            .staged_bytes = staged_bytes_.load(std::memory_order_relaxed)};
  }

 private:
  mutable std::mutex mutex_;
  std::map<uintptr_t, uint64_t> ranges_;  // begin to bytes
  std::atomic<uint64_t> direct_bytes_{0};
  std::atomic<uint64_t> staged_bytes_{0};
};

}  // namespace loraserve
