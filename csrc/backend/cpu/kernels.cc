#include "backend/cpu/kernels.h"

#include <cstring>

namespace loraserve {

namespace generic {
extern const CpuKernels kKernels;
}

#if defined(__x86_64__)
namespace x86_64_v2 {
extern const CpuKernels kKernels;
}
namespace x86_64_v3 {
extern const CpuKernels kKernels;
}
namespace x86_64_v4 {
extern const CpuKernels kKernels;
}

namespace avx512_bf16 {
void RoundedGemm(const GemmArgs& g);
}

namespace {
// All else is as in x86-64-v4.
const CpuKernels& V4WithBf16() {
  static const CpuKernels kernels = [] {
    CpuKernels v4 = x86_64_v4::kKernels;
    v4.name = "x86-64-v4-bf16";
    v4.rounded_gemm = avx512_bf16::RoundedGemm;
    return v4;
  }();
  return kernels;
}
}  // namespace

const CpuKernels& SelectKernels(const char* limit) {
  struct Level {
    const CpuKernels& kernels;
    bool runs;
  };
  const Level levels[] = {
      {V4WithBf16(), __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16")},
      {x86_64_v4::kKernels, __builtin_cpu_supports("x86-64-v4") != 0},
      {x86_64_v3::kKernels, __builtin_cpu_supports("x86-64-v3") != 0},
      {x86_64_v2::kKernels, __builtin_cpu_supports("x86-64-v2") != 0},
  };
  bool allowed = limit == nullptr || *limit == '\0';
  for (const Level& level : levels) {
    allowed = allowed || std::strcmp(level.kernels.name, limit) == 0;
    if (allowed && level.runs) return level.kernels;
  }
  return generic::kKernels;
}

bool HasKernels(const std::string& name) {
  return name == generic::kKernels.name || name == x86_64_v2::kKernels.name ||
         name == x86_64_v3::kKernels.name || name == x86_64_v4::kKernels.name ||
         name == V4WithBf16().name;
}
#else
const CpuKernels& SelectKernels(const char*) { return generic::kKernels; }

bool HasKernels(const std::string& name) { return name == generic::kKernels.name; }
#endif

}  // namespace loraserve
