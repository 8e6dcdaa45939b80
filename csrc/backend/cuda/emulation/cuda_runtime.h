// The part of the CUDA runtime and language that this folder uses, on the CPU, for tests.
//
// Blocks run as groups of fibres on the calling thread: a few blocks at a time, taking turns, the
// order of blocks and of threads varied from turn to turn. What it shows: indexing, fragments,
// paging, barriers that some threads miss, waits that never end, graphs replayed over changed
// data. What it cannot: races within a turn, memory ordering, speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "base/dtype.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// NOLINTBEGIN(readability-identifier-naming): the names are CUDA's.
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNotReady = 600,
  cudaErrorHostMemoryAlreadyRegistered = 712,
  cudaErrorHostMemoryNotRegistered = 713
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDefault = 0;
inline constexpr unsigned cudaEventDisableTiming = 2;
inline constexpr unsigned cudaHostRegisterDefault = 0;

struct EmulatedStream;
struct EmulatedEvent;
struct EmulatedGraph;
using cudaStream_t = EmulatedStream*;
using cudaEvent_t = EmulatedEvent*;
using cudaGraph_t = EmulatedGraph*;
using cudaGraphExec_t = EmulatedGraph*;

struct cudaDeviceProp {
  char name[256];
  int major, minor;
  int multiProcessorCount;
  size_t totalGlobalMem;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
// Fresh memory holds 0xff: NaN in every type of float.
cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaMallocHost(void** p, size_t bytes);
cudaError_t cudaFreeHost(void* p);
// By mlock, so that memory that cannot be locked, or is not there, is an error here too.
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void* p);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
// Of the host's clock.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, uint64_t flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

namespace loraserve::emulation {

void Launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const std::function<void()>& body);

struct Index {
  unsigned x, y, z;
};
Index ThreadIndex();
Index BlockIndex();
dim3 BlockSize();
dim3 GridSize();
uint8_t* SharedMemory();
void BlockBarrier();
void WarpBarrier();
void Pause();
// The value that thread `lane` of this warp gives, all lanes taking part.
uint64_t Exchange(uint64_t value, int lane);
int Lane();
void Mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void LoadMatrixTransposed(uint32_t (&r)[4], const void* row);
void CopyAsync16(void* shared, const void* global, bool valid);

template <class T>
T ExchangeAs(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = Exchange(bits, lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace loraserve::emulation

#define threadIdx (::loraserve::emulation::ThreadIndex())
#define blockIdx (::loraserve::emulation::BlockIndex())
#define blockDim (::loraserve::emulation::BlockSize())
#define gridDim (::loraserve::emulation::GridSize())

inline void __syncthreads() { loraserve::emulation::BlockBarrier(); }
inline void __syncwarp() { loraserve::emulation::WarpBarrier(); }
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return loraserve::emulation::ExchangeAs(value, loraserve::emulation::Lane() ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return loraserve::emulation::ExchangeAs(value, lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int lane = loraserve::emulation::Lane();
  return loraserve::emulation::ExchangeAs(value, lane < by ? lane : lane - by);
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
// One thread of the host runs all fibres: nothing comes between.
template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicOr(T* p, T value) {
  const T old = *p;
  *p = old | value;
  return old;
}
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
// NOLINTEND(readability-identifier-naming)
