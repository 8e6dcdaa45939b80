// Products of rounded rows with the instructions of AVX512-BF16; all else is as in x86-64-v4.
#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "backend/cpu/kernels.h"
#include "base/dtype.h"

#define LS_ISA avx512_bf16
#include "backend/cpu/simd.h"

namespace loraserve::LS_ISA {
namespace {
#include "backend/cpu/gemm.inc"
}  // namespace

void RoundedGemm(const GemmArgs& g) { GemmTyped<uint16_t, Pair, true>(g); }

}  // namespace loraserve::LS_ISA
