// What this machine's core can do at most: loops that only multiply and add in registers, or only
// read memory. The kernels are measured as a share of these, in the same process and minute.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace loraserve {

namespace limits {

template <int L>
struct Lanes {
  typedef float F __attribute__((vector_size(L * 4)));
};

// Twelve independent chains cover the latency of a multiply-add on two pipes.
inline constexpr int kChains = 12;

template <int L>
[[gnu::always_inline]] inline float FmaLoop(int64_t rounds) {
  using F = typename Lanes<L>::F;
  F sum[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) {
    sum[i] = F{} + static_cast<float>(i);
    asm volatile("" : "+x"(sum[i]));  // or equal chains would become one
  }
  F scale = F{} + 0.999f;
  F add = F{} + 1e-3f;
  for (int64_t round = 0; round < rounds; ++round) {
    // Registers as far as the compiler knows: it cannot fold the loop.
    asm volatile("" : "+x"(scale), "+x"(add));
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * scale + add;
  }
  F total{};
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) total += sum[i];
  return total[0];
}

template <int L>
[[gnu::always_inline]] inline float ReadLoop(const float* p, int64_t count) {
  using F = typename Lanes<L>::F;
  F sum[8] = {};
  for (int64_t i = 0; i + 8 * L <= count; i += 8 * L) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      F v;
      std::memcpy(&v, p + i + j * L, sizeof(v));
      sum[j] += v;
    }
  }
  F total{};
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) total += sum[j];
  return total[0];
}

#if defined(__x86_64__)
[[gnu::target("avx2,fma"), gnu::noinline, gnu::optimize("O3,fp-contract=fast")]]
inline float FmaAvx2(int64_t rounds) {
  return FmaLoop<8>(rounds);
}
[[gnu::target("avx512f"), gnu::noinline, gnu::optimize("O3,fp-contract=fast")]]
inline float FmaAvx512(int64_t rounds) {
  return FmaLoop<16>(rounds);
}
[[gnu::target("avx2"), gnu::noinline, gnu::optimize("O3")]]
inline float ReadAvx2(const float* p, int64_t count) {
  return ReadLoop<8>(p, count);
}
#endif

}  // namespace limits

// A multiply-add loop with the vectors of kernel table `isa`: `flops` floating-point operations are
// done on return. Not for tables without fused multiply-add.
inline float RunFmaLoop(const std::string& isa, int64_t flops) {
#if defined(__x86_64__)
  if (isa.starts_with("x86-64-v4")) return limits::FmaAvx512(flops / (limits::kChains * 16 * 2));
  return limits::FmaAvx2(flops / (limits::kChains * 8 * 2));
#else
  return limits::FmaLoop<4>(flops / (limits::kChains * 4 * 2));
#endif
}

// Reads `count` floats once, in order.
inline float RunReadLoop(const float* p, int64_t count) {
#if defined(__x86_64__)
  return limits::ReadAvx2(p, count);
#else
  return limits::ReadLoop<4>(p, count);
#endif
}

}  // namespace loraserve
