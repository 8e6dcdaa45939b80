// Launchers of the LoRA kernels.
#pragma once

#include "backend/cuda/platform.h"
#include "backend/cuda/step_header.h"

namespace loraserve {

// One rank tile of a source matrix: up to 8 rows of it, in device memory.
struct InstallStrip {
  uint64_t source = 0;  // bytes into the staged data
  uint32_t rows = 0;    // 1 to 8
  uint32_t columns = 0;
  uint32_t dtype = 0;  // DType
  uint32_t is_b = 0;
  uint32_t first_tile = 0;   // of column tile 0
  uint32_t tile_stride = 0;  // from one column tile to the next
};

// Writes the strips' tiles. All pointers are to device memory.
void InstallTiles(cudaStream_t stream, const InstallStrip* strips, uint32_t num_strips,
                  const uint8_t* data, const DeviceAdapter* adapter);

// Makes the list of units from the entries, and all counters zero. Once per step.
void MakeWorkList(cudaStream_t stream, const StepHeader* step);

// One projection group of one layer. `column[i]` is where the group's i-th module adds to y, -1 to
// leave it out. `y` and `x` are bfloat16.
struct LoraLaunch {
  const StepHeader* step = nullptr;
  int32_t layer = 0;
  int32_t group = 0;
  const uint16_t* x = nullptr;
  int64_t x_stride = 0;
  uint16_t* y = nullptr;
  int64_t y_stride = 0;
  int32_t first_module = 0;
  int64_t column[3] = {-1, -1, -1};
};

// Blocks to launch on a device with so many multiprocessors; also raises the kernels' limit of
// shared memory. Once, at start.
struct LoraGrids {
  uint32_t decode = 0;
  uint32_t prefill = 0;
};
LoraGrids PrepareLoraKernels(int multiprocessors);

// y[:, column:] += scaling * (x A^T) B for every entry. `token_tile` is the plan's.
void RunLora(cudaStream_t stream, const LoraGrids& grids, uint32_t token_tile,
             const LoraLaunch& launch);

}  // namespace loraserve
