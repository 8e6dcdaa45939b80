#include "backend/cuda/emulation/stream.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "base/check.h"

using loraserve::emulation::Enqueue;

struct EmulatedGraph {
  std::vector<std::function<void()>> work;
};

struct EmulatedStream {
  EmulatedGraph* recording = nullptr;
};

struct EmulatedEvent {
  std::chrono::steady_clock::time_point recorded;
};

namespace {

std::mutex registered_mutex;
std::map<void*, size_t> registered;
std::atomic<bool> memory_full{false};

}  // namespace

void SetEmulatedMemoryFull(bool full) { memory_full = full; }

namespace loraserve::emulation {

void Enqueue(cudaStream_t stream, std::function<void()> work) {
  LS_CHECK(stream != nullptr);
  if (stream->recording != nullptr) {
    stream->recording->work.push_back(std::move(work));
  } else {
    work();
  }
}

}  // namespace loraserve::emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorHostMemoryAlreadyRegistered:
      return "part or all of the requested memory range is already mapped";
    case cudaErrorHostMemoryNotRegistered:
      return "pointer does not correspond to a registered memory region";
  }
  return "unknown error";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {.name = "fibres",
                 .major = 9,
                 .minor = 0,
                 .multiProcessorCount = 4,
                 .totalGlobalMem = size_t{1} << 34};
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t{1} << 34;
  return cudaSuccess;
}

// Ends where it was asked to end, so that a sanitizer sees who goes past.
cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = nullptr;
  if (memory_full || bytes > size_t{1} << 34 || posix_memalign(p, 256, bytes) != 0) {
    return cudaErrorMemoryAllocation;
  }
  std::memset(*p, 0xff, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaMalloc(p, bytes); }
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }

cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  const std::lock_guard lock(registered_mutex);
  if (registered.contains(p)) return cudaErrorHostMemoryAlreadyRegistered;
  if (mlock(p, bytes) != 0) return cudaErrorMemoryAllocation;
  registered[p] = bytes;
  return cudaSuccess;
}

// An error where it has been unmapped since.
cudaError_t cudaHostUnregister(void* p) {
  const std::lock_guard lock(registered_mutex);
  const auto found = registered.find(p);
  if (found == registered.end() || munlock(p, found->second) != 0) {
    return cudaErrorHostMemoryNotRegistered;
  }
  registered.erase(found);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  Enqueue(stream, [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  Enqueue(stream, [=] { std::memset(p, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new EmulatedStream;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  LS_CHECK(stream->recording == nullptr);
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new EmulatedEvent;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->recorded = std::chrono::steady_clock::now();
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->recorded - begin->recorded).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  LS_CHECK(stream->recording == nullptr);
  stream->recording = new EmulatedGraph;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = std::exchange(stream->recording, nullptr);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, uint64_t) {
  *exec = new EmulatedGraph(*graph);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  for (const auto& work : exec->work) work();
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
