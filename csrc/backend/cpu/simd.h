// Vectors of L floats on GCC/Clang vector extensions. Included only by the kernel sources that are
// compiled once per instruction set; everything is inlined, nothing here may be shared
// (tools/check_spills.py looks, at what else they include too).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LS_NATIVE_LANES 16
#elif defined(__AVX2__)
#define LS_NATIVE_LANES 8
#else
#define LS_NATIVE_LANES 4
#endif

// Keeps a vector in a register at this point: the compiler may not have it in memory instead.
#if defined(__AVX512F__)
#define LS_PIN(vector) asm volatile("" : "+v"(vector))
#elif defined(__x86_64__)
#define LS_PIN(vector) asm volatile("" : "+x"(vector))
#elif defined(__aarch64__)
#define LS_PIN(vector) asm volatile("" : "+w"(vector))
#else
#define LS_PIN(vector)
#endif

#define LS_INLINE [[gnu::always_inline]] inline

namespace loraserve::LS_ISA {

inline constexpr int kNativeLanes = LS_NATIVE_LANES;

template <int L>
struct VectorOf {
  typedef float F __attribute__((vector_size(L * 4)));
  typedef uint32_t U __attribute__((vector_size(L * 4)));
  typedef int32_t I __attribute__((vector_size(L * 4)));
};

template <int L>
LS_INLINE typename VectorOf<L>::F Splat(float value) {
  // x - 0 is x for every x, so this becomes one broadcast; 0 + x is not (-0.0) and would add.
  return value - typename VectorOf<L>::F{};
}

template <int L>
LS_INLINE typename VectorOf<L>::F Load(const float* p) {
  typename VectorOf<L>::F v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Columns of k-row `row` (0 or 1) of a pair: bfloat16 lies as [columns][2], and its bits are the
// upper half of a float32, so one shift or one mask makes them exact floats. `row` is a constant.
template <int L>
LS_INLINE typename VectorOf<L>::F LoadRow(const uint16_t* p, int row) {
  typename VectorOf<L>::U u;
  std::memcpy(&u, p, sizeof(u));
  u = row == 0 ? u << 16 : u & 0xffff0000u;
  typename VectorOf<L>::F v;
  std::memcpy(&v, &u, sizeof(v));
  return v;
}
template <int L>
LS_INLINE typename VectorOf<L>::F LoadRow(const float* p, int) {
  return Load<L>(p);
}

template <class V>
LS_INLINE void Store(float* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// sum += a * b, with the sum in a register.
template <class V>
LS_INLINE void MultiplyAdd(V& sum, V a, V b) {
#if defined(__FMA__) && !defined(__AVX512F__)
  // With 16 registers the compiler likes to have the result where a was, and then spills.
  if constexpr (sizeof(V) == 32) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return;
  }
#endif
  sum += a * b;
  LS_PIN(sum);
}

// exp(x) for x <= 88, to 2 ulp; 0 below -87. Cody-Waite reduction and a degree-6 polynomial
// (coefficients: Taylor in the reduced range [-ln2/2, ln2/2], error below 1e-7 relative).
template <int L>
LS_INLINE typename VectorOf<L>::F Exp(typename VectorOf<L>::F x) {
  using F = typename VectorOf<L>::F;
  using I = typename VectorOf<L>::I;
  const F low = Splat<L>(-87.0f);
  const I keep = x > low;
  F clamped = keep ? x : low;
  const F high = Splat<L>(88.0f);
  clamped = clamped < high ? clamped : high;
  // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
  const F magic = Splat<L>(12582912.0f);
  F n = clamped * 1.44269504088896341f + magic;
  I bits;
  std::memcpy(&bits, &n, sizeof(bits));
  n = n - magic;
  const F r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  F p = Splat<L>(1.0f / 720.0f);
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  bits = ((bits & 0x1ff) + 127) << 23;
  // The low bits of n + magic hold n in two's complement; 9 bits cover [-126, 127].
  F scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  F result = p * scale;
  return keep ? result : F{};
}

}  // namespace loraserve::LS_ISA
