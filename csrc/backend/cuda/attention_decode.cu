#include <algorithm>

#include "backend/cuda/attention_tile.h"

namespace loraserve {

namespace {

constexpr int kMaxSplits = 16;

// A block for one row, up to 16 query heads of one KV head, and a part of the context. Each warp
// takes every fourth 16 tokens, staged for itself; the warps' parts meet at the end.
template <int D>
__global__ void __launch_bounds__(kAttentionThreads)
    DecodeKernel(const __grid_constant__ AttentionArgs a) {
  const int32_t index = a.step->row_sequence[blockIdx.x];
  if (index < 0) return;
  const SequenceSpan sequence = a.step->sequences[index];
  if (sequence.row_count != 1) return;
  const int32_t group = a.kv.num_heads / a.kv.num_kv_heads;
  const int32_t parts = (group + kRows - 1) / kRows;
  const int32_t head = static_cast<int32_t>(blockIdx.y) / parts;
  const int32_t first_query = static_cast<int32_t>(blockIdx.y) % parts * kRows;
  const auto warp = static_cast<int32_t>(threadIdx.x / kWarp);
  const uint32_t lane = threadIdx.x % kWarp;
  const auto g = static_cast<int32_t>(lane / 4);
  const auto t = static_cast<int32_t>(lane % 4);
  const int32_t high = sequence.context_length;
  const int32_t low = a.window > 0 && high > a.window ? high - a.window : 0;

  QueryRow rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t query = first_query + g + 8 * i;
    if (query >= group) continue;
    rows[i].q = a.qkv + blockIdx.x * a.qkv_stride + (head * group + query) * a.kv.head_dim;
    rows[i].first = low;
    rows[i].last = high - 1;
  }
  WarpState<D> state;
  Begin(state, rows, a.kv.head_dim);

  const int32_t first_chunk = low / kTokens;
  const int32_t chunks = (high + kTokens - 1) / kTokens - first_chunk;
  const int32_t per_split = (chunks + a.splits - 1) / a.splits;
  const auto split = static_cast<int32_t>(blockIdx.z);
  const int32_t end = split * per_split + per_split < chunks ? (split + 1) * per_split : chunks;

  // shared[warp][buffer][keys, values][token][D + 8]
  constexpr int32_t kPart = kTokens * (D + 8);
  auto* const shared = reinterpret_cast<uint16_t*>(SharedMemory()) + warp * 4 * kPart;
  const auto stage = [&](int32_t chunk, int32_t buffer) {
    const int32_t begin = (first_chunk + chunk) * kTokens;
    uint16_t* const to = shared + buffer * 2 * kPart;
    Stage<D>(a, sequence, head, false, begin, kTokens, low, high, lane, kWarp, to);
    Stage<D>(a, sequence, head, true, begin, kTokens, low, high, lane, kWarp, to + kPart);
    CopyAsyncCommit();
  };
  int32_t buffer = 0;
  int32_t chunk = split * per_split + warp;
  if (chunk < end) stage(chunk, buffer);
  for (; chunk < end; chunk += kAttentionWarps) {
    if (chunk + kAttentionWarps < end) {
      stage(chunk + kAttentionWarps, 1 - buffer);
      CopyAsyncWait<1>();
    } else {
      CopyAsyncWait<0>();
    }
    __syncwarp();
    const uint16_t* const keys = shared + buffer * 2 * kPart;
    Attend(state, rows, a.scale, (first_chunk + chunk) * kTokens, keys, keys + kPart);
    __syncwarp();
    buffer = 1 - buffer;
  }
  __syncthreads();
  // shared[warp][row][D + 2]: sums, then maximum and total weight.
  constexpr int32_t kStride = D + 2;
  auto* const meeting = reinterpret_cast<float*>(SharedMemory());
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float* const to = meeting + (warp * kRows + g + 8 * i) * kStride;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      to[n * 8 + 2 * t] = state.out[n][2 * i];
      to[n * 8 + 2 * t + 1] = state.out[n][2 * i + 1];
    }
    if (t == 0) {
      to[D] = state.maximum[i];
      to[D + 1] = state.sum[i];
    }
  }
  __syncthreads();
  const int32_t queries = group - first_query < kRows ? group - first_query : kRows;
  for (auto i = static_cast<int32_t>(threadIdx.x); i < queries * D;
       i += static_cast<int32_t>(kAttentionThreads)) {
    const int32_t row = i / D;
    const int32_t d = i % D;
    float maximum = -INFINITY;
    for (int w = 0; w < kAttentionWarps; ++w) {
      maximum = fmaxf(maximum, meeting[(w * kRows + row) * kStride + D]);
    }
    const float origin = maximum == -INFINITY ? 0.0f : maximum;
    float total = 0.0f;
    float out = 0.0f;
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float* const from = meeting + (w * kRows + row) * kStride;
      const float factor = exp2f(from[D] - origin);
      total += factor * from[D + 1];
      out += factor * from[d];
    }
    const int64_t query_head = head * group + first_query + row;
    if (a.splits == 1) {
      if (d < a.kv.head_dim) {
        a.y[blockIdx.x * a.y_stride + query_head * a.kv.head_dim + d] = ToBF16(out / total);
      }
      continue;
    }
    float* const to =
        a.partial + ((blockIdx.x * a.kv.num_heads + query_head) * a.splits + split) * kStride;
    to[d] = out;
    if (d == 0) {
      to[D] = maximum;
      to[D + 1] = total;
    }
  }
}

// Puts the splits of one row and head together.
template <int D>
__global__ void JoinKernel(const __grid_constant__ AttentionArgs a) {
  const int32_t index = a.step->row_sequence[blockIdx.x];
  if (index < 0 || a.step->sequences[index].row_count != 1) return;
  constexpr int32_t kStride = D + 2;
  const float* const parts =
      a.partial +
      (blockIdx.x * a.kv.num_heads + static_cast<int64_t>(blockIdx.y)) * a.splits * kStride;
  float maximum = -INFINITY;
  for (int32_t s = 0; s < a.splits; ++s) maximum = fmaxf(maximum, parts[s * kStride + D]);
  const float origin = maximum == -INFINITY ? 0.0f : maximum;
  for (auto d = static_cast<int32_t>(threadIdx.x); d < a.kv.head_dim;
       d += static_cast<int32_t>(blockDim.x)) {
    float total = 0.0f;
    float out = 0.0f;
    for (int32_t s = 0; s < a.splits; ++s) {
      const float factor = exp2f(parts[s * kStride + D] - origin);
      total += factor * parts[s * kStride + D + 1];
      out += factor * parts[s * kStride + d];
    }
    a.y[blockIdx.x * a.y_stride + blockIdx.y * a.kv.head_dim + d] = ToBF16(out / total);
  }
}

template <int D>
constexpr size_t SharedBytes() {
  return std::max(size_t{kAttentionWarps} * 4 * kTokens * (D + 8) * sizeof(uint16_t),
                  size_t{kAttentionWarps} * kRows * (D + 2) * sizeof(float));
}

template <int D>
void Prepare() {
  LS_CUDA(cudaFuncSetAttribute(DecodeKernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(SharedBytes<D>())));
}

template <int D>
void Decode(cudaStream_t stream, const AttentionArgs& a, dim3 grid) {
  Launch(DecodeKernel<D>, grid, dim3(kAttentionThreads), SharedBytes<D>(), stream, a);
  if (a.splits == 1) return;
  Launch(JoinKernel<D>, dim3(grid.x, static_cast<unsigned>(a.kv.num_heads)), dim3(64), 0, stream,
         a);
}

// Blocks that keep a device busy.
int Wanted(int multiprocessors) { return 4 * multiprocessors; }

}  // namespace

uint64_t AttentionScratchFloats(int multiprocessors) {
  return static_cast<uint64_t>(Wanted(multiprocessors)) * kRows * (kMaxHeadDim + 2);
}

void PrepareDecodeAttention() {
  Prepare<64>();
  Prepare<128>();
}

void RunDecodeAttention(cudaStream_t stream, const StepHeader* step, const KvView& kv, int layer,
                        int window, int multiprocessors, float* partial, Tensor qkv, Tensor y) {
  if (qkv.rows == 0) return;
  AttentionArgs a = ArgsOf(step, kv, layer, window, qkv, y);
  const int group = kv.num_heads / kv.num_kv_heads;
  const int heads = kv.num_kv_heads * ((group + kRows - 1) / kRows);
  const auto blocks = static_cast<int>(std::min<int64_t>(qkv.rows * heads, 1 << 20));
  a.splits = std::clamp(Wanted(multiprocessors) / blocks, 1, kMaxSplits);
  a.partial = partial;
  const dim3 grid(static_cast<unsigned>(qkv.rows), static_cast<unsigned>(heads),
                  static_cast<unsigned>(a.splits));
  if (kv.head_dim <= 64) {
    Decode<64>(stream, a, grid);
  } else {
    Decode<128>(stream, a, grid);
  }
}

}  // namespace loraserve
