#include <algorithm>
#include <bit>

#include "backend/cuda/device_memory.h"
#include "base/check.h"

namespace loraserve {

Status CudaStatus(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return Status();
  const StatusCode code = error == cudaErrorMemoryAllocation ? StatusCode::kResourceExhausted
                                                             : StatusCode::kUnavailable;
  return Status(code, what + ": " + cudaGetErrorString(error));
}

Result<std::unique_ptr<DeviceBuffer>> DeviceBuffer::Create(uint64_t bytes,
                                                           const std::string& what) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, std::max<uint64_t>(bytes, 1));
  if (error == cudaSuccess) return std::unique_ptr<DeviceBuffer>(new DeviceBuffer(data));
  (void)cudaGetLastError();  // not for the next launch to find
  size_t free = 0;
  size_t total = 0;
  LS_CUDA(cudaMemGetInfo(&free, &total));
  return CudaStatus(error, what + ": " + std::to_string(bytes) + " bytes wanted, " +
                               std::to_string(free) + " of the device's " + std::to_string(total) +
                               " are free");
}

DeviceBuffer::~DeviceBuffer() { LS_CUDA(cudaFree(data_)); }

ScratchBuffer::~ScratchBuffer() { LS_CUDA(cudaFree(data_)); }

void* ScratchBuffer::Reserve(uint64_t bytes, cudaStream_t stream) {
  if (bytes > bytes_) {
    LS_CUDA(cudaStreamSynchronize(stream));
    LS_CUDA(cudaFree(data_));
    bytes_ = std::bit_ceil(std::max<uint64_t>(bytes, 4096));
    LS_CUDA(cudaMalloc(&data_, bytes_));
  }
  return data_;
}

StagedTable::StagedTable() { LS_CUDA(cudaEventCreateWithFlags(&taken_, cudaEventDisableTiming)); }

StagedTable::~StagedTable() {
  LS_CUDA(cudaEventDestroy(taken_));
  LS_CUDA(cudaFreeHost(host_));
  LS_CUDA(cudaFree(device_));
}

void StagedTable::Begin(uint64_t bytes, cudaStream_t stream) {
  LS_CUDA(cudaEventSynchronize(taken_));
  used_ = 0;
  if (bytes <= bytes_) return;
  LS_CUDA(cudaStreamSynchronize(stream));
  LS_CUDA(cudaFreeHost(host_));
  LS_CUDA(cudaFree(device_));
  bytes_ = std::bit_ceil(std::max<uint64_t>(bytes, 4096));
  LS_CUDA(cudaMallocHost(reinterpret_cast<void**>(&host_), bytes_));
  LS_CUDA(cudaMalloc(reinterpret_cast<void**>(&device_), bytes_));
}

void StagedTable::CommitTo(void* device, cudaStream_t stream) {
  LS_CHECK(used_ <= bytes_);
  if (used_ == 0) return;
  LS_CUDA(cudaMemcpyAsync(device, host_, used_, cudaMemcpyHostToDevice, stream));
  LS_CUDA(cudaEventRecord(taken_, stream));
}

uint64_t BlockCache::Class(uint64_t bytes) { return std::bit_ceil(std::max<uint64_t>(bytes, 256)); }

BlockCache::~BlockCache() {
  for (const auto& [size, blocks] : free_) {
    for (void* block : blocks) LS_CUDA(cudaFree(block));
  }
}

void* BlockCache::Take(uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  std::vector<void*>& blocks = free_[Class(bytes)];
  if (!blocks.empty()) {
    void* const block = blocks.back();
    blocks.pop_back();
    return block;
  }
  void* block = nullptr;
  if (cudaMalloc(&block, Class(bytes)) != cudaSuccess) {
    (void)cudaGetLastError();
    return nullptr;
  }
  return block;
}

void BlockCache::Give(void* block, uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  free_[Class(bytes)].push_back(block);
}

}  // namespace loraserve
