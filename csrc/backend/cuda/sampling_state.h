// What the sampling kernel is made of: keys that order tokens, and reductions over a block.
#pragma once

#include "backend/cuda/platform.h"

namespace loraserve {

using Mass = unsigned long long;  // what atomicAdd takes

inline constexpr float kOne = 0x1p40f;           // the likeliest token's weight
inline constexpr uint32_t kNever = 0x007fffffu;  // the key of minus infinity

struct TokenBias {
  int32_t token;
  float bias;
};

struct RowParams {
  float temperature, top_p, min_p, repetition, presence, frequency;
  int32_t top_k, num_top, want_logprob, forced;
  double uniform;
  int32_t adjusts;
  int32_t num_prompt, num_output, num_bias, num_banned;
  const int32_t* prompt;
  const int32_t* output;
  const TokenBias* bias;
  const int32_t* banned;
  const uint32_t* mask;  // null: all
};

struct RowOut {
  int32_t token;
  float logprob;
};

struct TopOut {
  int32_t token;
  float logprob;
};

// Monotonic: a higher logit has a higher key. A NaN is never drawn; both zeros are one.
__device__ __forceinline__ uint32_t KeyOf(float logit) {
  if (!(logit == logit)) return kNever;
  const uint32_t bits = __float_as_uint(logit + 0.0f);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float LogitOf(uint32_t key) {
  return __uint_as_float((key >> 31) != 0 ? key & 0x7fffffffu : ~key);
}
// By logit, then the lower id first. Distinct for all tokens.
__device__ __forceinline__ Mass RankOf(uint32_t key, int32_t token) {
  return Mass{key} << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
__device__ __forceinline__ int32_t TokenOf(Mass rank) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank));
}

struct SharedState {
  Mass bins[256];
  Mass value[32];
  float sum[32];
  Mass rank;
  Mass left;
};

__device__ inline Mass BlockMax(Mass value, SharedState& s) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Mass other = __shfl_xor_sync(0xffffffffu, value, mask);
    value = other > value ? other : value;
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) s.value[threadIdx.x / kWarp] = value;
  __syncthreads();
  Mass best = s.value[0];
  for (unsigned i = 1; i < blockDim.x / kWarp; ++i) best = s.value[i] > best ? s.value[i] : best;
  return best;
}

__device__ inline Mass BlockTotal(Mass value, SharedState& s) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) s.value[threadIdx.x / kWarp] = value;
  __syncthreads();
  Mass total = 0;
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) total += s.value[i];
  return total;
}

__device__ inline float BlockSum(float value, SharedState& s) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) s.sum[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) total += s.sum[i];
  return total;
}

}  // namespace loraserve
