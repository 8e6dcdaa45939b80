#include "backend/cuda/lora_kernels.h"
#include "base/dtype.h"

namespace loraserve {

namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kWarps = kThreads / kWarp;
// Ranks of h that are staged in shared memory at a time, as pairs, and the padding against bank
// conflicts.
constexpr uint32_t kStageRanks = 128;
constexpr uint32_t kStageStride = kStageRanks / 2 + 4;

__device__ float SourceValue(const uint8_t* data, uint32_t dtype, uint64_t index) {
  if (dtype == static_cast<uint32_t>(DType::kF32)) {
    return reinterpret_cast<const float*>(data)[index];
  }
  const uint32_t bits = reinterpret_cast<const uint16_t*>(data)[index];
  if (dtype == static_cast<uint32_t>(DType::kBF16)) return BF16Value(bits);
  // binary16: exponent and mantissa move into place, then a product sets the bias and subnormals.
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t rest = (bits & 0x7fffu) << 13;
  if ((bits & 0x7c00u) == 0x7c00u) return __uint_as_float(sign | 0x7f800000u | rest);
  return __uint_as_float(__float_as_uint(__uint_as_float(rest) * 0x1p112f) | sign);
}

__global__ void InstallKernel(const InstallStrip* strips, const uint8_t* data,
                              const DeviceAdapter* adapter) {
  const InstallStrip strip = strips[blockIdx.x];
  const uint32_t tiles = CeilDiv(strip.columns, kTileColumns);
  for (uint32_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    auto* const to =
        reinterpret_cast<uint16_t*>(adapter->Tile(strip.first_tile + tile * strip.tile_stride));
    for (uint32_t i = threadIdx.x; i < kTileRanks * kTileColumns; i += blockDim.x) {
      const uint32_t rank = i / kTileColumns;
      const uint32_t within = i % kTileColumns;
      const uint32_t column = tile * kTileColumns + within;
      uint16_t value = 0;
      if (rank < strip.rows && column < strip.columns) {
        value = ToBF16(
            SourceValue(data + strip.source, strip.dtype, uint64_t{rank} * strip.columns + column));
      }
      to[strip.is_b != 0 ? BTileIndex(rank, within) : ATileIndex(rank, within)] = value;
    }
  }
}

__global__ void WorkListKernel(const StepHeader* step) {
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t threads = gridDim.x * blockDim.x;
  const auto entries = static_cast<uint32_t>(step->num_entries);
  const auto layers = static_cast<uint32_t>(step->num_lora_layers);
  for (uint32_t i = thread; i < layers * entries; i += threads) step->ready[i] = 0;
  for (uint32_t i = thread; i < layers * kNumLoraGroups; i += threads) step->tickets[i] = 0;
  for (uint32_t entry = thread / kWarp; entry < entries; entry += threads / kWarp) {
    const LoraEntry& e = step->entries[entry];
    for (uint32_t i = thread % kWarp; i < e.shrink_units; i += kWarp) {
      step->units[e.first_shrink + i] = {entry, i};
    }
    for (uint32_t i = thread % kWarp; i < e.expand_units; i += kWarp) {
      step->units[e.first_expand + i] = {entry, i};
    }
  }
}

// Eight consecutive values of a row as pairs; those at or past `count` are zero, and not read.
__device__ __forceinline__ uint4 Load8(const uint16_t* row, uint32_t column, uint32_t count) {
  if (column + 8 <= count) return *reinterpret_cast<const uint4*>(row + column);
  uint32_t pairs[4] = {0, 0, 0, 0};
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    if (column + i < count) pairs[i / 2] |= uint32_t{row[column + i]} << (16 * (i % 2));
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

__device__ __forceinline__ uint4 LoadLane(const uint8_t* tile, uint32_t load, uint32_t lane) {
  return reinterpret_cast<const uint4*>(tile)[load * kWarp + lane];
}

// The sums of 16 ranks over a part of the inputs, for the run's rows. Each warp takes every fourth
// column tile; weights are the M operand and rows the N operand, so that one row costs an eighth of
// what it would as M, and rank 8 half of rank 16.
template <uint32_t kTokens>
__device__ void Shrink(const LoraLaunch& p, const LoraEntry& entry, const DeviceModule& module,
                       uint32_t part_index, float* h, float* shared) {
  constexpr uint32_t kRowTiles = kTokens / 8;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = threadIdx.x / kWarp;
  const uint32_t g = lane / 4;
  const uint32_t t = lane % 4;
  const ShrinkPart part = ShrinkPartOf(entry, part_index);
  if (part.rank_begin >= module.rank || part.tile_begin >= module.in_tiles()) return;
  const uint32_t tile_end = part.tile_end < module.in_tiles() ? part.tile_end : module.in_tiles();
  const uint32_t first = part.rank_begin / kTileRanks;
  const bool both = first + 1 < module.rank_tiles();
  const auto rows = static_cast<uint32_t>(entry.row_count);

  float sum[kRowTiles][4];
#pragma unroll
  for (uint32_t n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (float& value : sum[n]) value = 0.0f;
  }
  for (uint32_t tile = part.tile_begin + warp; tile < tile_end; tile += kWarps) {
    const uint8_t* const low =
        entry.adapter->Tile(module.a_tile + first * module.in_tiles() + tile);
    const uint8_t* const high =
        both ? entry.adapter->Tile(module.a_tile + (first + 1) * module.in_tiles() + tile) : low;
    constexpr uint32_t kAhead = kTokens == kDecodeTokens ? 8 : 2;  // loads under way
#pragma unroll 1
    for (uint32_t begin = 0; begin < 8; begin += kAhead) {
      uint4 a[kAhead][2];
#pragma unroll
      for (uint32_t j = 0; j < kAhead; ++j) {
        a[j][0] = LoadLane(low, begin + j, lane);
        a[j][1] = both ? LoadLane(high, begin + j, lane) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (uint32_t j = 0; j < kAhead; ++j) {
        const uint32_t column = tile * kTileColumns + (begin + j) * 32 + t * 8;
        const uint32_t a0[4] = {a[j][0].x, a[j][1].x, a[j][0].y, a[j][1].y};
        const uint32_t a1[4] = {a[j][0].z, a[j][1].z, a[j][0].w, a[j][1].w};
#pragma unroll
        for (uint32_t n = 0; n < kRowTiles; ++n) {
          if (n * 8 >= rows) continue;
          uint4 x = {0, 0, 0, 0};
          if (n * 8 + g < rows) {
            const int64_t row = entry.row_begin + static_cast<int64_t>(n * 8 + g);
            x = Load8(p.x + row * p.x_stride, column, module.in_features);
          }
          const uint32_t b0[2] = {x.x, x.y};
          const uint32_t b1[2] = {x.z, x.w};
          Mma16816(sum[n], a0, b0);
          Mma16816(sum[n], a1, b1);
        }
      }
    }
  }
  // shared[warp][row][rank], the rows 17 apart so that the lanes of a warp hit different banks.
  constexpr uint32_t kStride = kShrinkRanks + 1;
#pragma unroll
  for (uint32_t n = 0; n < kRowTiles; ++n) {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t row = n * 8 + 2 * t + i % 2;
      shared[(warp * kTokens + row) * kStride + g + 8 * (i / 2)] = sum[n][i];
    }
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < rows * kShrinkRanks; i += kThreads) {
    const uint32_t row = i / kShrinkRanks;
    const uint32_t rank = i % kShrinkRanks;
    float total = 0.0f;
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) total += shared[(w * kTokens + row) * kStride + rank];
    h[(part.split * rows + row) * entry.rank_stride + part.rank_begin + rank] = total;
  }
}

// h of `kStageRanks` ranks from `rank_begin`, summed over the splits in their order, scaled, and
// halved into a bfloat16 and the bfloat16 of what that leaves: together good to 16 bits.
template <uint32_t kTokens>
__device__ void StageH(const LoraEntry& entry, const DeviceModule& module, uint32_t rank_begin,
                       const float* h, uint32_t* high, uint32_t* low) {
  const auto rows = static_cast<uint32_t>(entry.row_count);
  const uint32_t padded = module.rank_tiles() * kTileRanks;
  const uint32_t left = padded - rank_begin;
  const uint32_t pairs = (left < kStageRanks ? left : kStageRanks) / 2;
  const uint32_t splits = CeilDiv(module.in_tiles(), entry.split_tiles);
  for (uint32_t i = threadIdx.x; i < kTokens * pairs; i += kThreads) {
    const uint32_t row = i / pairs;
    const uint32_t pair = i % pairs;
    uint16_t upper[2] = {0, 0};
    uint16_t lower[2] = {0, 0};
    if (row < rows) {
#pragma unroll
      for (uint32_t j = 0; j < 2; ++j) {
        float value = 0.0f;
        for (uint32_t split = 0; split < splits; ++split) {
          value += __ldcg(h + (split * rows + row) * entry.rank_stride + rank_begin + 2 * pair + j);
        }
        value *= module.scaling;
        upper[j] = ToBF16(value);
        // Of an infinity or a NaN nothing is left, not infinity less infinity.
        const float rest = value - BF16Value(upper[j]);
        lower[j] = rest == rest ? ToBF16(rest) : 0;
      }
    }
    high[row * kStageStride + pair] = PackBF16(upper[0], upper[1]);
    low[row * kStageStride + pair] = PackBF16(lower[0], lower[1]);
  }
}

// Adds a lane's eight outputs of one row to y.
__device__ __forceinline__ void AddToY(uint16_t* y, const float (&values)[8], uint32_t count) {
  if (count >= 8 && reinterpret_cast<uintptr_t>(y) % 16 == 0) {
    auto* const vector = reinterpret_cast<uint4*>(y);
    const uint4 old = *vector;
    const uint32_t in[4] = {old.x, old.y, old.z, old.w};
    uint32_t out[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      out[i] = PackBF16(ToBF16(BF16Value(in[i] & 0xffffu) + values[2 * i]),
                        ToBF16(BF16Value(in[i] >> 16) + values[2 * i + 1]));
    }
    *vector = {out[0], out[1], out[2], out[3]};
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    if (i < count) y[i] = ToBF16(BF16Value(y[i]) + values[i]);
  }
}

// Some column tiles of y for the run's rows. A warp takes 64 outputs of each tile.
template <uint32_t kTokens>
__device__ void Expand(const LoraLaunch& p, const LoraEntry& entry, const DeviceModule& module,
                       uint32_t part_index, const float* h, const uint32_t* ready,
                       uint32_t* shared) {
  constexpr uint32_t kRowTiles = kTokens / 8;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = threadIdx.x / kWarp;
  const uint32_t g = lane / 4;
  const uint32_t t = lane % 4;
  const ExpandPart part = ExpandPartOf(entry, part_index);
  const uint32_t tile_end = part.tile_end < module.out_tiles() ? part.tile_end : module.out_tiles();
  const auto rows = static_cast<uint32_t>(entry.row_count);
  const uint32_t rank_tiles = module.rank_tiles();
  uint32_t* const high = shared;
  uint32_t* const low = shared + kTokens * kStageStride;
  const int64_t target = p.column[static_cast<int32_t>(entry.module) - p.first_module];

  // B does not depend on h: it is on its way to the cache while the block waits.
  for (uint32_t tile = part.tile_begin; tile < tile_end; ++tile) {
    for (uint32_t i = threadIdx.x; i < rank_tiles * (kTileBytes / 128); i += kThreads) {
      PrefetchL2(entry.adapter->Tile(module.b_tile + tile * rank_tiles + i / (kTileBytes / 128)) +
                 i % (kTileBytes / 128) * 128);
    }
  }
  if (threadIdx.x == 0) {
    while (LoadAcquire(ready) < entry.shrink_units) SpinPause();
    __threadfence();
  }
  __syncthreads();

  for (uint32_t tile = part.tile_begin; tile < tile_end; ++tile) {
    float sum[kRowTiles][2][2][4];
#pragma unroll
    for (uint32_t n = 0; n < kRowTiles; ++n) {
#pragma unroll
      for (uint32_t i = 0; i < 16; ++i) sum[n][i / 8][i / 4 % 2][i % 4] = 0.0f;
    }
    for (uint32_t begin = 0; begin < rank_tiles; begin += kStageRanks / kTileRanks) {
      if (tile == part.tile_begin || rank_tiles > kStageRanks / kTileRanks) {
        __syncthreads();  // the stage may still be read
        StageH<kTokens>(entry, module, begin * kTileRanks, h, high, low);
        __syncthreads();
      }
      const uint32_t left = rank_tiles - begin;
      const uint32_t count = left < kStageRanks / kTileRanks ? left : kStageRanks / kTileRanks;
#pragma unroll 2
      for (uint32_t r = 0; r < count; ++r) {
        const uint8_t* const weights =
            entry.adapter->Tile(module.b_tile + tile * rank_tiles + begin + r);
        const uint4 w[2] = {LoadLane(weights, warp * 2, lane),
                            LoadLane(weights, warp * 2 + 1, lane)};
#pragma unroll
        for (uint32_t n = 0; n < kRowTiles; ++n) {
          if (n * 8 >= rows) continue;
          // One product for both halves of h: the same weights meet ranks 0..7 and 8..15 of k.
          const uint32_t at = (n * 8 + g) * kStageStride + r * 4 + t;
          const uint32_t b[2] = {high[at], low[at]};
#pragma unroll
          for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t first[4] = {w[i].x, w[i].y, w[i].x, w[i].y};
            const uint32_t second[4] = {w[i].z, w[i].w, w[i].z, w[i].w};
            Mma16816(sum[n][i][0], first, b);
            Mma16816(sum[n][i][1], second, b);
          }
        }
      }
    }
    const uint32_t column = tile * kTileColumns + warp * 64 + g * 8;
    if (column >= module.out_features || target < 0) continue;
    const uint32_t count = module.out_features - column;
#pragma unroll
    for (uint32_t n = 0; n < kRowTiles; ++n) {
#pragma unroll
      for (uint32_t j = 0; j < 2; ++j) {
        const uint32_t row = n * 8 + 2 * t + j;
        if (row >= rows) continue;
        const float values[8] = {sum[n][0][0][j],     sum[n][0][0][j + 2], sum[n][0][1][j],
                                 sum[n][0][1][j + 2], sum[n][1][0][j],     sum[n][1][0][j + 2],
                                 sum[n][1][1][j],     sum[n][1][1][j + 2]};
        const int64_t y_row = entry.row_begin + static_cast<int64_t>(row);
        AddToY(p.y + y_row * p.y_stride + target + column, values, count);
      }
    }
  }
}

template <uint32_t kTokens>
constexpr uint32_t SharedBytes() {
  const uint32_t shrink = kWarps * kTokens * (kShrinkRanks + 1) * 4;
  const uint32_t expand = 2 * kTokens * kStageStride * 4;
  return 128 + (shrink > expand ? shrink : expand);
}

template <uint32_t kTokens>
__global__ void __launch_bounds__(kThreads) LoraKernel(const __grid_constant__ LoraLaunch p) {
  const StepHeader& step = *p.step;
  const LoraGroupRange range = step.groups[p.group];
  const uint32_t total = range.shrink_units + range.expand_units;
  if (total == 0 || p.layer >= step.num_lora_layers) return;
  auto* const ticket = reinterpret_cast<uint32_t*>(SharedMemory());
  uint8_t* const scratch = SharedMemory() + 128;
  uint32_t* const counter = step.tickets + p.layer * kNumLoraGroups + p.group;
  for (;;) {
    if (threadIdx.x == 0) *ticket = atomicAdd(counter, 1u);
    __syncthreads();
    const uint32_t taken = *ticket;
    if (taken >= total) return;
    const LoraUnit unit = step.units[range.first_unit + taken];
    const LoraEntry entry = step.entries[unit.entry];
    uint32_t* const ready = step.ready + p.layer * step.num_entries + unit.entry;
    float* const h = step.h + uint64_t{entry.h_offset} * 16;
    DeviceModule own;
    if (static_cast<uint32_t>(p.layer) < entry.adapter->num_layers) {
      own = entry.adapter
                ->modules[static_cast<uint32_t>(p.layer) * kCudaLinearModules + entry.module];
    }
    if (taken < range.shrink_units) {
      if (own.rank != 0) {
        Shrink<kTokens>(p, entry, own, unit.part, h, reinterpret_cast<float*>(scratch));
        __threadfence();
      }
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(ready, 1u);
    } else {
      if (own.rank != 0) {
        Expand<kTokens>(p, entry, own, unit.part, h, ready, reinterpret_cast<uint32_t*>(scratch));
      }
      __syncthreads();
    }
  }
}

template <uint32_t kTokens>
uint32_t GridOf(int multiprocessors) {
  LS_CUDA(cudaFuncSetAttribute(LoraKernel<kTokens>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(SharedBytes<kTokens>())));
  int blocks = 0;
  LS_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, LoraKernel<kTokens>, static_cast<int>(kThreads), SharedBytes<kTokens>()));
  return static_cast<uint32_t>(blocks * multiprocessors);
}

}  // namespace

void InstallTiles(cudaStream_t stream, const InstallStrip* strips, uint32_t num_strips,
                  const uint8_t* data, const DeviceAdapter* adapter) {
  Launch(InstallKernel, dim3(num_strips, 8), dim3(256), 0, stream, strips, data, adapter);
}

void MakeWorkList(cudaStream_t stream, const StepHeader* step) {
  Launch(WorkListKernel, dim3(32), dim3(256), 0, stream, step);
}

LoraGrids PrepareLoraKernels(int multiprocessors) {
  return {.decode = GridOf<kDecodeTokens>(multiprocessors),
          .prefill = GridOf<kPrefillTokens>(multiprocessors)};
}

void RunLora(cudaStream_t stream, const LoraGrids& grids, uint32_t token_tile,
             const LoraLaunch& launch) {
  if (token_tile == kDecodeTokens) {
    Launch(LoraKernel<kDecodeTokens>, dim3(grids.decode), dim3(kThreads),
           SharedBytes<kDecodeTokens>(), stream, launch);
  } else {
    Launch(LoraKernel<kPrefillTokens>, dim3(grids.prefill), dim3(kThreads),
           SharedBytes<kPrefillTokens>(), stream, launch);
  }
}

}  // namespace loraserve
