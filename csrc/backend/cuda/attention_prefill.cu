#include "backend/cuda/attention_tile.h"

namespace loraserve {

namespace {

constexpr int kPrefillTokens = 32;  // that a block stages at a time

// A block for 64 rows of one KV head: each warp has 16, and all share the staged tokens.
template <int D>
__global__ void __launch_bounds__(kAttentionThreads)
    PrefillKernel(const __grid_constant__ AttentionArgs a) {
  const AttentionTile tile = a.step->attention_tiles[blockIdx.x];
  const SequenceSpan sequence = a.step->sequences[tile.sequence];
  const auto head = static_cast<int32_t>(blockIdx.y);
  const int32_t group = a.kv.num_heads / a.kv.num_kv_heads;
  const int32_t positions = group >= kAttentionTileRows ? 1 : kAttentionTileRows / group;
  const int32_t left = sequence.row_count - tile.row_begin;
  const int32_t count = left < positions ? left : positions;
  const int32_t first_position = sequence.context_length - sequence.row_count + tile.row_begin;
  const auto warp = static_cast<int32_t>(threadIdx.x / kWarp);
  const auto g = static_cast<int32_t>(threadIdx.x % kWarp / 4);
  const auto t = static_cast<int32_t>(threadIdx.x % 4);

  QueryRow rows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t packed = warp * kRows + g + 8 * i;
    const int32_t row = packed / group;
    if (row >= count) continue;
    const int64_t at = sequence.row_begin + tile.row_begin + row;
    const int32_t column = (head * group + packed % group) * a.kv.head_dim;
    rows[i].q = a.qkv + at * a.qkv_stride + column;
    rows[i].y = a.y + at * a.y_stride + column;
    rows[i].last = first_position + row;
    const int32_t first = rows[i].last - a.window + 1;
    rows[i].first = a.window > 0 && first > 0 ? first : 0;
  }
  const int32_t seen = first_position - a.window + 1;
  const int32_t low = a.window > 0 && seen > 0 ? seen : 0;
  const int32_t high = first_position + count;

  WarpState<D> state;
  Begin(state, rows, a.kv.head_dim);
  // shared[buffer][keys, values][token][D + 8]
  constexpr int32_t kPart = kPrefillTokens * (D + 8);
  auto* const shared = reinterpret_cast<uint16_t*>(SharedMemory());
  const auto stage = [&](int32_t begin, int32_t buffer) {
    uint16_t* const to = shared + buffer * 2 * kPart;
    Stage<D>(a, sequence, head, false, begin, kPrefillTokens, low, high, threadIdx.x,
             kAttentionThreads, to);
    Stage<D>(a, sequence, head, true, begin, kPrefillTokens, low, high, threadIdx.x,
             kAttentionThreads, to + kPart);
    CopyAsyncCommit();
  };
  int32_t buffer = 0;
  const int32_t begin = low / kPrefillTokens * kPrefillTokens;
  stage(begin, buffer);
  for (int32_t position = begin; position < high; position += kPrefillTokens) {
    if (position + kPrefillTokens < high) {
      stage(position + kPrefillTokens, 1 - buffer);
      CopyAsyncWait<1>();
    } else {
      CopyAsyncWait<0>();
    }
    __syncthreads();
    const uint16_t* const keys = shared + buffer * 2 * kPart;
#pragma unroll
    for (int32_t part = 0; part < kPrefillTokens; part += kTokens) {
      Attend(state, rows, a.scale, position + part, keys + part * (D + 8),
             keys + kPart + part * (D + 8));
    }
    __syncthreads();
    buffer = 1 - buffer;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows[i].q == nullptr) continue;
    const float inverse = 1.0f / state.sum[i];
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      StorePair(rows[i].y, n * 8 + 2 * t, a.kv.head_dim, state.out[n][2 * i] * inverse,
                state.out[n][2 * i + 1] * inverse);
    }
  }
}

template <int D>
constexpr size_t SharedBytes() {
  return size_t{4} * kPrefillTokens * (D + 8) * sizeof(uint16_t);
}

template <int D>
void Prepare() {
  LS_CUDA(cudaFuncSetAttribute(PrefillKernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(SharedBytes<D>())));
}

}  // namespace

void PreparePrefillAttention() {
  Prepare<64>();
  Prepare<128>();
}

void RunPrefillAttention(cudaStream_t stream, const StepHeader* step, const KvView& kv, int layer,
                         int window, int num_tiles, Tensor qkv, Tensor y) {
  if (num_tiles == 0) return;
  const AttentionArgs a = ArgsOf(step, kv, layer, window, qkv, y);
  const dim3 grid(static_cast<unsigned>(num_tiles), static_cast<unsigned>(kv.num_kv_heads));
  if (kv.head_dim <= 64) {
    Launch(PrefillKernel<64>, grid, dim3(kAttentionThreads), SharedBytes<64>(), stream, a);
  } else {
    Launch(PrefillKernel<128>, grid, dim3(kAttentionThreads), SharedBytes<128>(), stream, a);
  }
}

}  // namespace loraserve
