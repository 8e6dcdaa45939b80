// The part of cuBLASLt that is used, opened at run time: neither its headers nor the library are
// needed to build. Names and values are those of cublasLt.h 12 and 13.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/platform.h"
#include "base/status.h"

namespace loraserve {

using LtStatus = int;  // 0 is success
using LtHandle = struct LtContext*;
using LtMatmulDesc = struct LtMatmulDescOpaque*;
using LtMatrixLayout = struct LtMatrixLayoutOpaque*;
using LtMatmulPreference = struct LtMatmulPreferenceOpaque*;

struct LtMatmulAlgo {
  uint64_t data[8];
};
struct LtHeuristicResult {
  LtMatmulAlgo algorithm;
  size_t workspace_bytes;
  LtStatus state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(LtHeuristicResult) == 96);

inline constexpr int kLtCompute32F = 68;             // CUBLAS_COMPUTE_32F
inline constexpr int kLtR32F = 0;                    // CUDA_R_32F
inline constexpr int kLtR16BF = 14;                  // CUDA_R_16BF
inline constexpr int kLtTransposed = 1;              // CUBLAS_OP_T
inline constexpr int kLtDescTransA = 3;              // CUBLASLT_MATMUL_DESC_TRANSA
inline constexpr int kLtPreferenceMaxWorkspace = 1;  // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES

struct CublasLtApi {
  size_t (*GetVersion)();
  LtStatus (*Create)(LtHandle*);
  LtStatus (*Destroy)(LtHandle);
  LtStatus (*MatmulDescCreate)(LtMatmulDesc*, int compute, int scale);
  LtStatus (*MatmulDescDestroy)(LtMatmulDesc);
  LtStatus (*MatmulDescSetAttribute)(LtMatmulDesc, int attribute, const void*, size_t);
  LtStatus (*MatrixLayoutCreate)(LtMatrixLayout*, int type, uint64_t rows, uint64_t cols,
                                 int64_t ld);
  LtStatus (*MatrixLayoutDestroy)(LtMatrixLayout);
  LtStatus (*MatmulPreferenceCreate)(LtMatmulPreference*);
  LtStatus (*MatmulPreferenceDestroy)(LtMatmulPreference);
  LtStatus (*MatmulPreferenceSetAttribute)(LtMatmulPreference, int attribute, const void*, size_t);
  LtStatus (*MatmulAlgoGetHeuristic)(LtHandle, LtMatmulDesc, LtMatrixLayout a, LtMatrixLayout b,
                                     LtMatrixLayout c, LtMatrixLayout d, LtMatmulPreference,
                                     int wanted, LtHeuristicResult*, int* found);
  LtStatus (*Matmul)(LtHandle, LtMatmulDesc, const void* alpha, const void* a, LtMatrixLayout,
                     const void* b, LtMatrixLayout, const void* beta, const void* c, LtMatrixLayout,
                     void* d, LtMatrixLayout, const LtMatmulAlgo*, void* workspace, size_t,
                     cudaStream_t);
};

// LORASERVE_CUBLASLT names the file; without it, the loader's own search for libcublasLt.so.13 and
// .12. The library stays open until the process ends.
Result<CublasLtApi> OpenCublasLt();

}  // namespace loraserve
