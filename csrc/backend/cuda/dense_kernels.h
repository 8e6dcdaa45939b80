// Launchers of the element-wise kernels. Activations are bfloat16, sums float32.
#pragma once

#include "backend/backend.h"
#include "backend/cuda/kv_view.h"

namespace loraserve {

void RunEmbed(cudaStream_t stream, const StepHeader* step, const uint16_t* table,
              int64_t table_stride, Tensor y);
void RunRmsNorm(cudaStream_t stream, Tensor x, const float* weight, int64_t group, float eps,
                Tensor y);
void RunSiluMul(cudaStream_t stream, Tensor gate_up, Tensor y);
// y[i] = x[rows[i]]; `rows` in device memory.
void RunGatherRows(cudaStream_t stream, Tensor x, const int32_t* rows, Tensor y);
// Every row of y becomes `bias`.
void RunFillRows(cudaStream_t stream, const float* bias, Tensor y);
void RunRopeAndStoreKv(cudaStream_t stream, const StepHeader* step, const KvView& kv, int layer,
                       const float* inverse_frequencies, Tensor qkv);

}  // namespace loraserve
