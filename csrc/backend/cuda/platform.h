// The CUDA runtime and the few device instructions that kernels here use.
//
// With LORASERVE_CUDA_EMULATED the same sources compile for the CPU: the runtime is
// emulation/cuda_runtime.h, and an instruction is what PTX says it does, in software.
#pragma once

#ifdef LORASERVE_CUDA_EMULATED
#include "backend/cuda/emulation/cuda_runtime.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace loraserve {

// Ends the process with the place and CUDA's own words. Every call of the runtime goes through it,
// or through CudaStatus (cuda_status.h) where the caller can be told.
#define LS_CUDA(call)                                                    \
  do {                                                                   \
    const cudaError_t ls_cuda_error = (call);                            \
    if (ls_cuda_error != cudaSuccess) {                                  \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(ls_cuda_error));                   \
      std::abort();                                                      \
    }                                                                    \
  } while (false)

inline constexpr int kWarp = 32;

#ifdef LORASERVE_CUDA_EMULATED

template <class... P, class... A>
void Launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            A... arguments) {
  emulation::Launch(grid, block, shared_bytes, stream,
                    [=] { kernel(static_cast<P>(arguments)...); });
}

inline uint8_t* SharedMemory() { return emulation::SharedMemory(); }
inline float BF16Value(uint32_t bits) { return BF16ToF32(static_cast<uint16_t>(bits)); }
inline uint16_t ToBF16(float value) { return F32ToBF16(value); }
inline void Mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::Mma16816(d, a, b);
}
inline void LoadMatrixTransposed(uint32_t (&r)[4], const void* row) {
  emulation::LoadMatrixTransposed(r, row);
}
inline void CopyAsync16(void* shared, const void* global, bool valid) {
  emulation::CopyAsync16(shared, global, valid);
}
inline void CopyAsyncCommit() {}
template <int kPending>
void CopyAsyncWait() {}
inline void PrefetchL2(const void*) {}
inline uint32_t LoadAcquire(const uint32_t* p) { return *p; }
inline void SpinPause() { emulation::Pause(); }

#elif defined(__CUDACC__)

template <class... P, class... A>
void Launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            A... arguments) {
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(arguments)...);
  // clang-format on
  LS_CUDA(cudaGetLastError());
}

// Dynamic shared memory: the only kind used here.
__device__ __forceinline__ uint8_t* SharedMemory() {
  extern __shared__ __align__(128) uint8_t ls_shared_memory[];
  return ls_shared_memory;
}

__device__ __forceinline__ float BF16Value(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ uint16_t ToBF16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// d += a b with a [16, 16] row-major, b [16, 8] column-major in bfloat16, d [16, 8] in float32:
// the fragments of PTX mma.sync.m16n8k16.
__device__ __forceinline__ void Mma16816(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit elements, transposed; lane i gives the address of row i % 8 of matrix
// i / 8, 16 bytes in shared memory.
__device__ __forceinline__ void LoadMatrixTransposed(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// 16 bytes into shared memory in the background; zeros, and no read, unless `valid`.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;"); }
// Until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void PrefetchL2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
__device__ __forceinline__ uint32_t LoadAcquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void SpinPause() { __nanosleep(64); }

#endif

__host__ __device__ __forceinline__ uint32_t PackBF16(uint16_t low, uint16_t high) {
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}

}  // namespace loraserve
