// The operations that a model step needs, on one device.
//
// Everything is row-major. `Tensor` is a view of device memory in the backend's activation dtype
// (float32 on the CPU). Work is queued on `stream` in call order; data may be read by the host
// after Synchronize(stream). One thread, the engine's, calls a Backend.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend/adapter_source.h"
#include "backend/sample_row.h"
#include "base/dtype.h"
#include "base/page_id.h"
#include "base/status.h"

namespace loraserve {

// Orders work on the device. The CPU backend runs at once and takes nullptr.
struct Stream;

// A view [rows, cols]; consecutive rows are `stride` elements apart.
struct Tensor {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
};

// Device memory, released with the object.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void* data() = 0;
};

// A weight in the backend's own layout, dtype and scales.
class PreparedWeight {
 public:
  virtual ~PreparedWeight() = default;
  virtual int64_t out_features() const = 0;
  virtual int64_t in_features() const = 0;
  virtual int64_t bytes() const = 0;
};

// An adapter written into pages, in the backend's own tiles.
class InstalledAdapter {
 public:
  virtual ~InstalledAdapter() = default;
  // Of the weights themselves in their stored dtype; what its pages hold besides is waste.
  virtual uint64_t weight_bytes() const = 0;
};

// How KV blocks lie in pages. A tile is the keys or the values of one layer for one block; it
// never straddles two pages. Tile t of a block is in the block's page t / tiles_per_page.
struct KvLayout {
  int num_layers = 0;
  int num_heads = 0;     // query heads
  int num_kv_heads = 0;  // divides num_heads
  int head_dim = 0;
  int block_size = 0;  // tokens, a multiple of 16
  uint64_t page_bytes = 0;
  uint64_t tile_bytes = 0;
  int tiles_per_page = 0;
  int pages_per_block = 0;
};

// One sequence's part of a step: rows [row_begin, row_begin + row_count) of the activations are its
// positions [context_length - row_count, context_length).
struct SequenceSpan {
  int32_t row_begin = 0;
  int32_t row_count = 0;
  int32_t context_length = 0;  // tokens in the cache once this step has stored its own
  int32_t page_begin = 0;      // into StepInputs::block_pages; pages_per_block for each block
};

// What a step reads, in host memory. A backend copies it to the device in one go.
struct StepInputs {
  std::span<const int32_t> token_ids;  // [rows]
  std::span<const int32_t> positions;  // [rows]
  std::span<const SequenceSpan> sequences;
  std::span<const PageId> block_pages;
};

// Consecutive rows that share an adapter.
struct LoraSegment {
  int32_t row_begin = 0;
  int32_t row_count = 0;
  const InstalledAdapter* adapter = nullptr;
};

// Which module of the adapters applies, and the first column of y that it adds to. Several targets
// in one call share their input (q, k, v; gate, up).
struct LoraTarget {
  int layer = 0;
  LinearModule module = LinearModule::kQ;
  int64_t column = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;

  // Elements between rows of an activation of `cols` columns: what Gemm may write past `cols`.
  virtual int64_t RowStride(int64_t cols) const = 0;
  virtual DType activation_dtype() const = 0;
  virtual Result<std::unique_ptr<Buffer>> Allocate(uint64_t bytes) = 0;
  virtual void Synchronize(Stream* stream) = 0;
  // Between the host's memory and the device's. The host's side stays valid and is not looked at
  // until Synchronize(stream).
  virtual void CopyToDevice(Stream* stream, const void* host, void* device, uint64_t bytes) = 0;
  virtual void CopyToHost(Stream* stream, const void* device, void* host, uint64_t bytes) = 0;

  // The matrices stacked on their rows as one weight [sum of rows, cols]; `bias` has one value per
  // row or is empty. `dtype` is how it is kept: kF32 or kBF16.
  virtual Result<std::unique_ptr<PreparedWeight>> PrepareWeight(std::span<const HostMatrix> parts,
                                                                std::vector<float> bias,
                                                                DType dtype) = 0;
  // A vector of float32 in device memory, for norms.
  virtual Result<std::unique_ptr<Buffer>> PrepareVector(std::span<const float> values) = 0;

  // Sets kv_layout's page geometry for its other fields: tile_bytes for the backend's KV dtype.
  virtual uint64_t KvTileBytes(const KvLayout& layout) const = 0;
  // The arena's memory. Pages are addressed as base + page * layout.page_bytes from then on.
  virtual Status BindPages(const KvLayout& layout, uint32_t num_pages,
                           std::span<const float> inverse_frequencies) = 0;

  // Pages that InstallAdapter will want.
  virtual uint32_t AdapterPages(const AdapterSource& source) const = 0;
  // Writes the adapter into `pages`; they stay the caller's.
  virtual Result<std::unique_ptr<InstalledAdapter>> InstallAdapter(
      Stream* stream, const AdapterSource& source, std::span<const PageId> pages) = 0;

  // The inputs of the operations below, until the next call. They outlive the step.
  virtual void BeginStep(Stream* stream, const StepInputs& inputs) = 0;

  // y[i] = row token_ids[i] of the embedding.
  virtual void Embed(Stream* stream, const PreparedWeight& embedding, Tensor y) = 0;
  // y = x / sqrt(mean(x^2) + eps) * weight, by groups of `group` columns (whole rows, or heads).
  virtual void RmsNorm(Stream* stream, Tensor x, const Buffer& weight, int64_t group, float eps,
                       Tensor y) = 0;
  // y = x W^T + bias, or y += x W^T.
  virtual void Gemm(Stream* stream, Tensor x, const PreparedWeight& weight, bool accumulate,
                    Tensor y) = 0;
  // Rotates the q and k columns of qkv [rows, q | k | v] and stores k and v in the cache.
  virtual void RopeAndStoreKv(Stream* stream, int layer, Tensor qkv) = 0;
  // Causal attention of the q columns over the cache; `window` limits it to the last `window`
  // positions, 0 does not. y is [rows, num_heads * head_dim].
  virtual void PagedAttention(Stream* stream, int layer, Tensor qkv, int window, Tensor y) = 0;
  // y = silu(gate) * up for gate_up [rows, gate | up].
  virtual void SiluMul(Stream* stream, Tensor gate_up, Tensor y) = 0;

  // Floats of `h` that LoraShrink wants for these segments and targets.
  virtual int64_t LoraScratch(std::span<const LoraSegment> segments,
                              std::span<const LoraTarget> targets) const = 0;
  // h = scaling * x A^T for every segment and target; each with its own rank.
  virtual void LoraShrink(Stream* stream, Tensor x, std::span<const LoraSegment> segments,
                          std::span<const LoraTarget> targets, void* h) = 0;
  // y[:, column:] += h B for the same segments and targets.
  virtual void LoraExpand(Stream* stream, const void* h, std::span<const LoraSegment> segments,
                          std::span<const LoraTarget> targets, Tensor y) = 0;

  // y[i] = x[rows[i]].
  virtual void GatherRows(Stream* stream, Tensor x, std::span<const int32_t> rows, Tensor y) = 0;
  // Draws one token per row of the logits; blocks until the results are on the host.
  virtual void Sample(Stream* stream, Tensor logits, std::span<const SampleRow> rows,
                      std::span<SampleResult> results) = 0;
};

}  // namespace loraserve
