// Memory on the device and what moves data into it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/platform.h"

namespace loraserve {

// The Status of a call that may fail for good reasons; `what` begins the message.
Status CudaStatus(cudaError_t error, const std::string& what);

class DeviceBuffer final : public Buffer {
 public:
  // kResourceExhausted, with what is free, if the device has no such memory.
  static Result<std::unique_ptr<DeviceBuffer>> Create(uint64_t bytes, const std::string& what);
  ~DeviceBuffer() override;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void* data() override { return data_; }
  const void* data() const { return data_; }

 private:
  explicit DeviceBuffer(void* data) : data_(data) {}
  void* data_;
};

// Device memory that grows, without its contents, to the largest size asked for: a warm engine
// allocates nothing. No work that uses it may be under way when it grows, so it waits for `stream`.
class ScratchBuffer {
 public:
  ScratchBuffer() = default;
  ~ScratchBuffer();
  ScratchBuffer(const ScratchBuffer&) = delete;
  ScratchBuffer& operator=(const ScratchBuffer&) = delete;
  void* Reserve(uint64_t bytes, cudaStream_t stream);

 private:
  void* data_ = nullptr;
  uint64_t bytes_ = 0;
};

// A small table that the host writes and the device reads: pinned memory, and its copy. The host
// waits, where it must, until the device has taken the former contents.
class StagedTable {
 public:
  StagedTable();
  ~StagedTable();
  StagedTable(const StagedTable&) = delete;
  StagedTable& operator=(const StagedTable&) = delete;

  // Begins a table of at most `bytes`; both sides' addresses are valid until the next Begin.
  void Begin(uint64_t bytes, cudaStream_t stream);
  // Room for `count` of T, 16-byte aligned: the host's address; the device's by device().
  template <class T>
  T* Add(size_t count) {
    used_ = (used_ + 15) / 16 * 16;
    T* const at = reinterpret_cast<T*>(host_ + used_);
    used_ += count * sizeof(T);
    return at;
  }
  template <class T>
  T* device(const T* host) const {
    return reinterpret_cast<T*>(device_ + (reinterpret_cast<const std::byte*>(host) - host_));
  }
  // Copies what was added, to device() or to an address of the caller's.
  void Commit(cudaStream_t stream) { CommitTo(device_, stream); }
  void CommitTo(void* device, cudaStream_t stream);

 private:
  std::byte* host_ = nullptr;
  std::byte* device_ = nullptr;
  uint64_t bytes_ = 0;
  uint64_t used_ = 0;
  cudaEvent_t taken_ = nullptr;
};

// Small blocks of device memory for installed adapters, kept when given back: cudaMalloc would
// wait for the device. Any thread.
class BlockCache {
 public:
  ~BlockCache();
  void* Take(uint64_t bytes);  // null if there is no memory
  void Give(void* block, uint64_t bytes);

 private:
  static uint64_t Class(uint64_t bytes);
  std::mutex mutex_;
  std::map<uint64_t, std::vector<void*>> free_;
};

}  // namespace loraserve
