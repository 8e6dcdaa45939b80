// The Backend of host memory and SIMD kernels. Activations and KV are float32; products with
// bfloat16 base weights may read the activations rounded.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/adapter_tiles.h"
#include "backend/cpu/attention_tasks.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/prepared_weight.h"
#include "backend/cpu/sampler.h"
#include "base/thread_pool.h"

namespace loraserve {

struct CpuBackendOptions {
  int threads = 1;
  std::optional<DType> adapter_dtype;    // in pages; none: bfloat16 stays so, the rest is float32
  DType activation_dtype = DType::kF32;  // that products with base weights read; or kBF16
  std::string isa;                       // the highest instruction set to use; empty: no limit
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const CpuBackendOptions& options);

  std::string name() const override;
  int64_t RowStride(int64_t cols) const override { return (cols + 15) / 16 * 16; }
  DType activation_dtype() const override { return DType::kF32; }
  Result<std::unique_ptr<Buffer>> Allocate(uint64_t bytes) override;
  void Synchronize(Stream*) override {}
  void CopyToDevice(Stream*, const void* host, void* device, uint64_t bytes) override;
  void CopyToHost(Stream*, const void* device, void* host, uint64_t bytes) override;
  Result<std::unique_ptr<PreparedWeight>> PrepareWeight(std::span<const HostMatrix> parts,
                                                        std::vector<float> bias,
                                                        DType dtype) override;
  Result<std::unique_ptr<Buffer>> PrepareVector(std::span<const float> values) override;
  uint64_t KvTileBytes(const KvLayout& layout) const override;
  Status BindPages(const KvLayout& layout, uint32_t num_pages,
                   std::span<const float> inverse_frequencies) override;
  uint32_t AdapterPages(const AdapterSource& source) const override;
  Result<std::unique_ptr<AdapterInstall>> StartInstall(const AdapterSource& source,
                                                       std::span<const PageId> pages) override;
  void BeginStep(Stream*, const StepInputs& inputs) override;
  void Embed(Stream*, const PreparedWeight& embedding, Tensor y) override;
  void RmsNorm(Stream*, Tensor x, const Buffer& weight, int64_t group, float eps,
               Tensor y) override;
  void Gemm(Stream*, Tensor x, const PreparedWeight& weight, bool accumulate, Tensor y) override;
  void RopeAndStoreKv(Stream*, int layer, Tensor qkv) override;
  void PagedAttention(Stream*, int layer, Tensor qkv, int window, Tensor y) override;
  void SiluMul(Stream*, Tensor gate_up, Tensor y) override;
  void Lora(Stream*, Tensor x, std::span<const LoraTarget> targets, Tensor y) override;
  void GatherRows(Stream*, Tensor x, std::span<const int32_t> rows, Tensor y) override;
  void Sample(Stream*, Tensor logits, std::span<const SampleRow> rows,
              std::span<SampleResult> results) override;

 private:
  DType StoredDType(const AdapterSource& source) const;
  // The keys or values of `layer` for one block and head.
  float* BlockTile(const SequenceSpan& sequence, int block, int layer, bool values, int head) const;
  // All of a call but where the keys and values are, and these for the positions [begin, end).
  void Describe(const AttentionTask& task, Tensor qkv, int window, Tensor y,
                AttentionCall& call) const;
  void FindPanels(const AttentionTask& task, int layer, int32_t begin, int32_t end,
                  AttentionCall& call) const;
  // False, and nothing done, where no task has several spans or their results are too many to keep.
  bool AttentionBySpans(const std::vector<AttentionTask>& tasks, int layer, Tensor qkv, int window,
                        Tensor y);
  // Calls function(begin, end, share) for `units` of the given cost each, split evenly over the
  // threads where the whole is worth it.
  template <class Function>
  void Split(int64_t units, int64_t cost, Function&& function);

  CpuBackendOptions options_;
  const CpuKernels& kernels_;
  ThreadPool pool_;
  KvLayout layout_;
  int padded_head_dim_ = 0;
  std::unique_ptr<HostBuffer> pages_;
  std::vector<float> inverse_frequencies_;  // [head_dim / 2]

  StepInputs inputs_;
  std::vector<float> cos_, sin_;                  // [rows][head_dim / 2] of this step
  std::vector<float> lora_h_;                     // the shrink results of one call
  std::vector<std::vector<float>> gemm_scratch_;  // by share of the pool, as are those below
  std::vector<AttentionCall> attention_;
  std::vector<float> attention_states_;  // [spans][queries] of every task of one call
  std::vector<SamplerScratch> sampler_scratch_;
};

}  // namespace loraserve
