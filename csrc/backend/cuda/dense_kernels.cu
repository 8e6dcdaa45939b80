#include "backend/cuda/dense_kernels.h"

namespace loraserve {

namespace {

constexpr unsigned kThreads = 128;

uint16_t* Data(const Tensor& t) { return static_cast<uint16_t*>(t.data); }

__global__ void EmbedKernel(const StepHeader* step, const uint16_t* table, int64_t table_stride,
                            uint16_t* y, int64_t y_stride, int64_t columns) {
  const uint16_t* const from = table + step->token_ids[blockIdx.x] * table_stride;
  uint16_t* const to = y + blockIdx.x * y_stride;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) to[i] = from[i];
}

__global__ void GatherRowsKernel(const uint16_t* x, int64_t x_stride, const int32_t* rows,
                                 uint16_t* y, int64_t y_stride, int64_t columns) {
  const uint16_t* const from = x + rows[blockIdx.x] * x_stride;
  uint16_t* const to = y + blockIdx.x * y_stride;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) to[i] = from[i];
}

__global__ void FillRowsKernel(const float* bias, uint16_t* y, int64_t y_stride, int64_t columns) {
  uint16_t* const to = y + blockIdx.x * y_stride;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) to[i] = ToBF16(bias[i]);
}

// The sum over the block, in an order that depends on the block's size alone.
__device__ float BlockSum(float value) {
  auto* const shared = reinterpret_cast<float*>(SharedMemory());
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) total += shared[i];
  return total;
}

// A block for each group of columns; y may be x.
__global__ void RmsNormKernel(const uint16_t* x, int64_t x_stride, const float* weight,
                              int64_t group, float eps, uint16_t* y, int64_t y_stride) {
  const uint16_t* const from = x + blockIdx.x * x_stride + blockIdx.y * group;
  uint16_t* const to = y + blockIdx.x * y_stride + blockIdx.y * group;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < group; i += blockDim.x) {
    const float value = BF16Value(from[i]);
    squares += value * value;
  }
  const float scale = 1.0f / sqrtf(BlockSum(squares) / static_cast<float>(group) + eps);
  for (int64_t i = threadIdx.x; i < group; i += blockDim.x) {
    to[i] = ToBF16(BF16Value(from[i]) * scale * weight[i]);
  }
}

__global__ void SiluMulKernel(const uint16_t* gate_up, int64_t x_stride, uint16_t* y,
                              int64_t y_stride, int64_t columns) {
  const uint16_t* const gate = gate_up + blockIdx.x * x_stride;
  uint16_t* const to = y + blockIdx.x * y_stride;
  const int64_t step = int64_t{gridDim.y} * blockDim.x;
  for (int64_t i = blockIdx.y * blockDim.x + threadIdx.x; i < columns; i += step) {
    const float g = BF16Value(gate[i]);
    to[i] = ToBF16(g / (1.0f + expf(-g)) * BF16Value(gate[columns + i]));
  }
}

// A block for each row. A thread owns one pair of dimensions of one head.
__global__ void RopeAndStoreKvKernel(const StepHeader* step, KvView kv, int32_t layer,
                                     const float* inverse_frequencies, uint16_t* qkv,
                                     int64_t stride) {
  const auto row = static_cast<int32_t>(blockIdx.x);
  const int32_t index = step->row_sequence[row];
  if (index < 0) return;
  const SequenceSpan sequence = step->sequences[index];
  const int32_t position = sequence.context_length - sequence.row_count + row - sequence.row_begin;
  const auto angle_position = static_cast<float>(step->positions[row]);
  const int32_t half = kv.head_dim / 2;
  const int32_t heads = kv.num_heads + 2 * kv.num_kv_heads;
  uint16_t* const values = qkv + row * stride;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < heads * half;
       i += static_cast<int32_t>(blockDim.x)) {
    const int32_t head = i / half;
    const int32_t d = i % half;
    uint16_t* const at = values + head * kv.head_dim + d;
    uint16_t low = at[0];
    uint16_t high = at[half];
    const bool value = head >= kv.num_heads + kv.num_kv_heads;
    if (!value) {
      float sine;
      float cosine;
      sincosf(angle_position * inverse_frequencies[d], &sine, &cosine);
      const float a = BF16Value(low);
      const float b = BF16Value(high);
      low = ToBF16(a * cosine - b * sine);
      high = ToBF16(b * cosine + a * sine);
      at[0] = low;
      at[half] = high;
    }
    if (head < kv.num_heads) continue;
    const int32_t kv_head = head - kv.num_heads - (value ? kv.num_kv_heads : 0);
    uint16_t* const to = kv.Token(*step, sequence, layer, value, kv_head, position) + d;
    to[0] = low;
    to[half] = high;
  }
}

dim3 Rows(const Tensor& y, int64_t columns = 1) {
  return dim3(static_cast<unsigned>(y.rows), static_cast<unsigned>(columns));
}

}  // namespace

void RunEmbed(cudaStream_t stream, const StepHeader* step, const uint16_t* table,
              int64_t table_stride, Tensor y) {
  if (y.rows == 0) return;
  Launch(EmbedKernel, Rows(y), dim3(kThreads), 0, stream, step, table, table_stride, Data(y),
         y.stride, y.cols);
}

void RunRmsNorm(cudaStream_t stream, Tensor x, const float* weight, int64_t group, float eps,
                Tensor y) {
  if (x.rows == 0) return;
  const unsigned threads = group <= 256 ? kWarp : 256;
  Launch(RmsNormKernel, Rows(x, x.cols / group), dim3(threads), 64, stream, Data(x), x.stride,
         weight, group, eps, Data(y), y.stride);
}

void RunSiluMul(cudaStream_t stream, Tensor gate_up, Tensor y) {
  if (y.rows == 0) return;
  const int64_t parts = (y.cols + 4 * kThreads - 1) / (4 * kThreads);
  Launch(SiluMulKernel, Rows(y, parts), dim3(kThreads), 0, stream, Data(gate_up), gate_up.stride,
         Data(y), y.stride, y.cols);
}

void RunGatherRows(cudaStream_t stream, Tensor x, const int32_t* rows, Tensor y) {
  if (y.rows == 0) return;
  Launch(GatherRowsKernel, Rows(y), dim3(kThreads), 0, stream, Data(x), x.stride, rows, Data(y),
         y.stride, y.cols);
}

void RunFillRows(cudaStream_t stream, const float* bias, Tensor y) {
  if (y.rows == 0) return;
  Launch(FillRowsKernel, Rows(y), dim3(kThreads), 0, stream, bias, Data(y), y.stride, y.cols);
}

void RunRopeAndStoreKv(cudaStream_t stream, const StepHeader* step, const KvView& kv, int layer,
                       const float* inverse_frequencies, Tensor qkv) {
  if (qkv.rows == 0) return;
  Launch(RopeAndStoreKvKernel, Rows(qkv), dim3(kThreads), 0, stream, step, kv, layer,
         inverse_frequencies, Data(qkv), qkv.stride);
}

}  // namespace loraserve
