#include <iterator>
#include <string>

#include "backend/cuda/device_memory.h"
#include "backend/cuda/host_registry.h"
#include "base/check.h"

namespace loraserve {

HostRegistry::~HostRegistry() {
  for (const auto& [begin, bytes] : ranges_) {
    LS_CUDA(cudaHostUnregister(reinterpret_cast<void*>(begin)));
  }
}

Status HostRegistry::Register(void* memory, uint64_t bytes) {
  const std::string what = "host memory: " + std::to_string(bytes) + " bytes cannot be locked";
  if (memory == nullptr || bytes == 0) return Status(StatusCode::kInvalidArgument, what);
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const std::lock_guard lock(mutex_);
  const auto after = ranges_.lower_bound(begin);
  if ((after != ranges_.end() && after->first < begin + bytes) ||
      (after != ranges_.begin() && std::prev(after)->first + std::prev(after)->second > begin)) {
    return Status(StatusCode::kAlreadyExists, what + ": part of it is registered");
  }
  // Not read-only: the mapping is written by the host, and few systems have that kind at all. Not
  // portable: there is one context. Not mapped: kernels never read host memory.
  const cudaError_t error = cudaHostRegister(memory, bytes, cudaHostRegisterDefault);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // not for the next launch to find
    return CudaStatus(error, what);
  }
  ranges_[begin] = bytes;
  return Status();
}

void HostRegistry::Unregister(void* memory) {
  const std::lock_guard lock(mutex_);
  LS_CHECK(ranges_.erase(reinterpret_cast<uintptr_t>(memory)) == 1);
  LS_CUDA(cudaHostUnregister(memory));
}

bool HostRegistry::Holds(const void* memory, uint64_t bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const std::lock_guard lock(mutex_);
  const auto after = ranges_.upper_bound(begin);
  if (after == ranges_.begin()) return false;
  const auto& [first, length] = *std::prev(after);
  return begin - first <= length && bytes <= length - (begin - first);
}

}  // namespace loraserve
