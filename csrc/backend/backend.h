// The operations that a model step needs, on one device.
//
// Everything is row-major. `Tensor` is a view of device memory in the backend's activation dtype
// (float32 on the CPU). Work is queued on `stream` in call order; data may be read by the host
// after Synchronize(stream).
//
// Threads: one thread, the engine's, calls a Backend, but for the writing of adapters. StartInstall
// and the methods of the AdapterInstalls that it returns are called by one other thread, while the
// engine's is anywhere in a step. They touch nothing that an operation of a step changes: no shared
// scratch, no pool of workers, no stream of the engine's. The pages they write are read by no step
// until the engine has been handed the InstalledAdapter.
#pragma once

#include <cstdint>
#include <functional>
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

// An adapter on its way into pages, part by part, so that whoever writes it can pause between the
// parts or give up. Given up, it leaves the pages with anything in them.
class AdapterInstall {
 public:
  virtual ~AdapterInstall() = default;
  // Writes the next part, of about `bytes` bytes of the pages; false once nothing is left to write.
  virtual bool Write(uint64_t bytes) = 0;
  // The adapter, once every operation queued from now on would find it in its pages. REQUIRES:
  // Write returned false. Called once.
  virtual std::unique_ptr<InstalledAdapter> Finish() = 0;
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

// Consecutive rows that share an adapter.
struct LoraSegment {
  int32_t row_begin = 0;
  int32_t row_count = 0;
  const InstalledAdapter* adapter = nullptr;
};

// What a step reads, in host memory. A backend copies it to the device in one go.
struct StepInputs {
  std::span<const int32_t> token_ids;  // [rows]
  std::span<const int32_t> positions;  // [rows]
  std::span<const SequenceSpan> sequences;
  std::span<const PageId> block_pages;
  std::span<const LoraSegment> segments;  // in order of rows, apart; rows in none have no adapter
};

// Which module of the adapters applies, and the first column of y that it adds to. Several targets
// in one call share their input (q, k, v; gate, up).
struct LoraTarget {
  int layer = 0;
  LinearModule module = LinearModule::kQ;
  int64_t column = 0;
};

// Adapter bytes that installs have read from host memory.
struct InstallReads {
  uint64_t direct_bytes = 0;  // by the device, from memory registered with RegisterHostMemory
  uint64_t staged_bytes = 0;  // copied to page-locked memory of the backend's own first
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
  // Foretells that Gemm will be asked for `weight` with x and y of these strides, on PaddedRows(n,
  // max_rows) rows for any n up to `max_rows`: what has to be found out about a shape is found out
  // now, not in a step.
  virtual void PlanGemm(const PreparedWeight& /*weight*/, int64_t /*x_stride*/,
                        int64_t /*y_stride*/, bool /*accumulate*/, int64_t /*max_rows*/) {}
  // `rows`, or more up to `max_rows`: what to run a product on that nobody reads the last rows of.
  virtual int64_t PaddedRows(int64_t rows, int64_t /*max_rows*/) const { return rows; }
  // A vector of float32 in device memory, for norms.
  virtual Result<std::unique_ptr<Buffer>> PrepareVector(std::span<const float> values) = 0;

  // Sets kv_layout's page geometry for its other fields: tile_bytes for the backend's KV dtype.
  virtual uint64_t KvTileBytes(const KvLayout& layout) const = 0;
  // The arena's memory. Pages are addressed as base + page * layout.page_bytes from then on.
  virtual Status BindPages(const KvLayout& layout, uint32_t num_pages,
                           std::span<const float> inverse_frequencies) = 0;

  // Pages that StartInstall will want.
  virtual uint32_t AdapterPages(const AdapterSource& source) const = 0;
  // Begins to write the adapter into `pages`, which stay the caller's. What `source` points to is
  // read until the AdapterInstall is gone.
  virtual Result<std::unique_ptr<AdapterInstall>> StartInstall(const AdapterSource& source,
                                                               std::span<const PageId> pages) = 0;
  // All of it at once, in the caller's thread.
  Result<std::unique_ptr<InstalledAdapter>> InstallAdapter(const AdapterSource& source,
                                                           std::span<const PageId> pages) {
    auto install = StartInstall(source, pages);
    if (!install.ok()) return install.status();
    while (install.value()->Write(UINT64_MAX)) {
    }
    return install.value()->Finish();
  }

  // The inputs of the operations below, until the next call. They outlive the step.
  virtual void BeginStep(Stream* stream, const StepInputs& inputs) = 0;
  // Calls step(n), which queues the operations of the step begun last on n rows of activations that
  // stay where they are from step to step: `rows`, or more up to `max_rows`, of which nobody reads
  // what comes after `rows`. A backend may record a step and repeat it for later inputs instead.
  virtual void RunStep(Stream*, int64_t rows, int64_t /*max_rows*/,
                       const std::function<void(int64_t)>& step) {
    step(rows);
  }

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

  // y[:, column:] += (scaling * x A^T) B for every segment of the step and every target, each with
  // its own rank. Once per step for a layer's module.
  virtual void Lora(Stream* stream, Tensor x, std::span<const LoraTarget> targets, Tensor y) = 0;

  // y[i] = x[rows[i]].
  virtual void GatherRows(Stream* stream, Tensor x, std::span<const int32_t> rows, Tensor y) = 0;
  // Draws one token per row of the logits; blocks until the results are on the host.
  virtual void Sample(Stream* stream, Tensor logits, std::span<const SampleRow> rows,
                      std::span<SampleResult> results) = 0;

  // Locks [memory, memory + bytes) in place and lets the device copy from it directly, at full
  // speed and beside the steps; installs read from anywhere else too, by a copy more. It must stay
  // mapped until UnregisterHostMemory or the backend's end. False where the backend has no use for
  // it. kResourceExhausted (so much cannot be locked), kAlreadyExists (part of it is registered),
  // kUnavailable. Slow: every page is faulted in. Both are called by any thread.
  virtual Result<bool> RegisterHostMemory(void* /*memory*/, uint64_t /*bytes*/) { return false; }
  // REQUIRES: registered, and no install from it is under way.
  virtual void UnregisterHostMemory(void* /*memory*/) {}
  virtual InstallReads install_reads() const { return {}; }
};

}  // namespace loraserve
