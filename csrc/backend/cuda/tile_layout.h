// How an adapter's matrices lie in pages on CUDA: tiles of 4 KiB in bfloat16.
//
// A [rank, in] is cut into tiles of 8 ranks x 256 inputs, B [rank, out] into tiles of 8 ranks x 256
// outputs; what a tile has beyond its matrix is zero. A page holds whole tiles. Within a tile,
// elements are in the order in which the lanes of a warp want them: one load of 16 bytes by each
// lane is 512 bytes in a row, and is an operand of the tensor cores as it comes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LS_HOST_DEVICE __host__ __device__
#else
#define LS_HOST_DEVICE
#endif

namespace loraserve {

inline constexpr uint32_t kTileBytes = 4096;
inline constexpr uint32_t kTileRanks = 8;
inline constexpr uint32_t kTileColumns = 256;

LS_HOST_DEVICE constexpr uint32_t CeilDiv(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Where element (rank, column) of a tile lies, in elements. Lane 4 g + t of a warp holds rank g and
// the inputs 32 j + 8 t .. + 7 of an A tile in its load j.
LS_HOST_DEVICE constexpr uint32_t ATileIndex(uint32_t rank, uint32_t column) {
  return (column / 32 * 32 + rank * 4 + column % 32 / 8) * 8 + column % 8;
}
// Warp w holds outputs 64 w .. + 63 of a B tile; its lane 4 g + t the outputs 64 w + 8 g .. + 7 of
// the ranks 2 t and 2 t + 1, four outputs in each of two loads.
LS_HOST_DEVICE constexpr uint32_t BTileIndex(uint32_t rank, uint32_t column) {
  const uint32_t load = column / 64 * 2 + column % 8 / 4;
  const uint32_t lane = column % 64 / 8 * 4 + rank / 2;
  return (load * 32 + lane) * 8 + column % 4 * 2 + rank % 2;
}

// One module of an installed adapter in one layer. rank 0: the adapter leaves it alone.
struct DeviceModule {
  uint32_t rank = 0;
  uint32_t in_features = 0;
  uint32_t out_features = 0;
  float scaling = 0.0f;
  uint32_t a_tile = 0;  // A's first tile in the adapter's run: [rank tile][column tile]
  uint32_t b_tile = 0;  // B's: [column tile][rank tile]
  uint32_t unused[2] = {0, 0};

  LS_HOST_DEVICE uint32_t rank_tiles() const { return CeilDiv(rank, kTileRanks); }
  LS_HOST_DEVICE uint32_t in_tiles() const { return CeilDiv(in_features, kTileColumns); }
  LS_HOST_DEVICE uint32_t out_tiles() const { return CeilDiv(out_features, kTileColumns); }
  LS_HOST_DEVICE uint32_t tiles() const { return rank_tiles() * (in_tiles() + out_tiles()); }
};

// An installed adapter as the kernels see it, in device memory.
struct DeviceAdapter {
  const DeviceModule* modules = nullptr;  // [layers][7]
  uint8_t* const* pages = nullptr;        // addresses, in the order of the run
  uint32_t num_layers = 0;
  uint32_t tiles_per_page_shift = 0;

  LS_HOST_DEVICE uint8_t* Tile(uint32_t tile) const {
    const uint32_t within = tile & ((1u << tiles_per_page_shift) - 1);
    return pages[tile >> tiles_per_page_shift] + uint64_t{within} * kTileBytes;
  }
};

}  // namespace loraserve
