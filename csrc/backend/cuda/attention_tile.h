// What the attention kernels share: a warp's 16 rows against 16 staged tokens.
#pragma once

#include <cmath>

#include "backend/cuda/attention.h"

namespace loraserve {

inline constexpr unsigned kAttentionThreads = 128;
inline constexpr int kAttentionWarps = 4;
inline constexpr int kRows = 16;    // of a warp's tile: query heads times positions
inline constexpr int kTokens = 16;  // keys of one product

struct AttentionArgs {
  const StepHeader* step = nullptr;
  KvView kv;
  int32_t layer = 0;
  int32_t window = 0;
  float scale = 1.0f;  // of scores, times log2(e)
  const uint16_t* qkv = nullptr;
  int64_t qkv_stride = 0;
  uint16_t* y = nullptr;
  int64_t y_stride = 0;
  int32_t splits = 1;
  float* partial = nullptr;  // [row][head][split][D + 2]
};

// One of a warp's 16 rows: a query head at a position, and the positions that it may see.
struct QueryRow {
  const uint16_t* q = nullptr;  // null: no such row
  uint16_t* y = nullptr;
  int32_t first = 0;
  int32_t last = -1;
};

// Rows g and g + 8 of the warp's tile are this lane's. D is head_dim rounded up; what is past
// head_dim is zero throughout.
template <int D>
struct WarpState {
  uint32_t q[D / 16][4];
  float out[D / 8][4];
  float maximum[2];
  float sum[2];
};

__device__ __forceinline__ uint32_t LoadPair(const uint16_t* row, int32_t column, int32_t count) {
  if (row == nullptr || column >= count) return 0;
  return *reinterpret_cast<const uint32_t*>(row + column);
}

template <int D>
__device__ void Begin(WarpState<D>& state, const QueryRow (&rows)[2], int32_t head_dim) {
  const auto t = static_cast<int32_t>(threadIdx.x % 4);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    state.q[k][0] = LoadPair(rows[0].q, 16 * k + 2 * t, head_dim);
    state.q[k][1] = LoadPair(rows[1].q, 16 * k + 2 * t, head_dim);
    state.q[k][2] = LoadPair(rows[0].q, 16 * k + 8 + 2 * t, head_dim);
    state.q[k][3] = LoadPair(rows[1].q, 16 * k + 8 + 2 * t, head_dim);
  }
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (float& value : state.out[n]) value = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state.maximum[i] = -INFINITY;
    state.sum[i] = 0.0f;
  }
}

// Stages the keys or values of `count` tokens from `begin`, a multiple of 16: rows of D + 8 values,
// so that the lanes of a warp meet different banks. What is outside [low, high) or past head_dim
// becomes zero and is not read: it may be another's.
template <int D>
__device__ void Stage(const AttentionArgs& a, const SequenceSpan& sequence, int32_t head,
                      bool values, int32_t begin, int32_t count, int32_t low, int32_t high,
                      uint32_t thread, uint32_t threads, uint16_t* to) {
  constexpr uint32_t kVectors = D / 8;
  for (uint32_t i = thread; i < static_cast<uint32_t>(count) * kVectors; i += threads) {
    const auto token = static_cast<int32_t>(i / kVectors);
    const auto column = static_cast<int32_t>(i % kVectors * 8);
    const int32_t position = begin + token;
    const bool valid = position >= low && position < high && column < a.kv.head_dim;
    const uint16_t* from = reinterpret_cast<const uint16_t*>(a.kv.arena);
    if (valid) from = a.kv.Token(*a.step, sequence, a.layer, values, head, position) + column;
    CopyAsync16(to + token * (D + 8) + column, from, valid);
  }
}

// 16 staged tokens, the first at `position`, for a warp's rows.
template <int D>
__device__ void Attend(WarpState<D>& state, const QueryRow (&rows)[2], float scale,
                       int32_t position, const uint16_t* keys, const uint16_t* values) {
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarp);
  const int32_t g = lane / 4;
  const int32_t t = lane % 4;
  float scores[2][4];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (float& value : scores[n]) value = 0.0f;
    const uint16_t* const key = keys + (n * 8 + g) * (D + 8) + 2 * t;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(key + 16 * k),
                             *reinterpret_cast<const uint32_t*>(key + 16 * k + 8)};
      Mma16816(scores[n], state.q[k], b);
    }
  }
  uint32_t weights[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // rows g and g + 8
    float maximum = -INFINITY;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int32_t at = position + n * 8 + 2 * t + j;
        float& score = scores[n][2 * i + j];
        score = at >= rows[i].first && at <= rows[i].last ? score * scale : -INFINITY;
        maximum = fmaxf(maximum, score);
      }
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
    maximum = fmaxf(maximum, state.maximum[i]);
    // A row that has seen nothing yet: any finite number keeps infinity less infinity away.
    const float origin = maximum == -INFINITY ? 0.0f : maximum;
    const float shrunk = exp2f(state.maximum[i] - origin);
    state.maximum[i] = maximum;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint16_t bits[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        bits[j] = ToBF16(exp2f(scores[n][2 * i + j] - origin));
        sum += BF16Value(bits[j]);  // of what is multiplied with the values
      }
      weights[2 * n + i] = PackBF16(bits[0], bits[1]);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    state.sum[i] = state.sum[i] * shrunk + sum;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      state.out[n][2 * i] *= shrunk;
      state.out[n][2 * i + 1] *= shrunk;
    }
  }
  const uint16_t* const value = values + (lane / 8 % 2 * 8 + lane % 8) * (D + 8) + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < D / 16; ++n) {
    uint32_t b[4];
    LoadMatrixTransposed(b, value + 16 * n);
    const uint32_t first[2] = {b[0], b[1]};
    const uint32_t second[2] = {b[2], b[3]};
    Mma16816(state.out[2 * n], weights, first);
    Mma16816(state.out[2 * n + 1], weights, second);
  }
}

__device__ __forceinline__ void StorePair(uint16_t* y, int32_t column, int32_t count, float a,
                                          float b) {
  if (column < count) *reinterpret_cast<uint32_t*>(y + column) = PackBF16(ToBF16(a), ToBF16(b));
}

inline AttentionArgs ArgsOf(const StepHeader* step, const KvView& kv, int layer, int window,
                            Tensor qkv, Tensor y) {
  AttentionArgs a;
  a.step = step;
  a.kv = kv;
  a.layer = layer;
  a.window = window;
  a.scale = 1.44269504f / std::sqrt(static_cast<float>(kv.head_dim));
  a.qkv = static_cast<const uint16_t*>(qkv.data);
  a.qkv_stride = qkv.stride;
  a.y = static_cast<uint16_t*>(y.data);
  a.y_stride = y.stride;
  return a;
}

}  // namespace loraserve
