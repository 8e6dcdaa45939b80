// The Backend of CUDA devices of compute capability 8.0 and above. Activations, KV, weights and
// adapters are bfloat16, sums float32; weights and adapters of another dtype are rounded once.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/adapter_installer.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/gemm.h"
#include "backend/cuda/host_registry.h"
#include "backend/cuda/kv_view.h"
#include "backend/cuda/lora_kernels.h"
#include "backend/cuda/sampler.h"
#include "backend/cuda/step_graphs.h"

namespace loraserve {

class CudaBackend final : public Backend {
 public:
  // kUnavailable, with what is missing, without a device, a driver or cuBLASLt.
  static Result<std::unique_ptr<CudaBackend>> Create();
  ~CudaBackend() override;

  std::string name() const override { return name_; }
  // What calls without a Stream are queued on.
  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }
  int64_t RowStride(int64_t cols) const override { return (cols + 7) / 8 * 8; }
  DType activation_dtype() const override { return DType::kBF16; }
  Result<std::unique_ptr<Buffer>> Allocate(uint64_t bytes) override;
  void Synchronize(Stream* stream) override;
  void CopyToDevice(Stream* stream, const void* host, void* device, uint64_t bytes) override;
  void CopyToHost(Stream* stream, const void* device, void* host, uint64_t bytes) override;
  Result<bool> RegisterHostMemory(void* memory, uint64_t bytes) override;
  void UnregisterHostMemory(void* memory) override { host_registry_.Unregister(memory); }
  InstallReads install_reads() const override { return host_registry_.reads(); }
  Result<std::unique_ptr<PreparedWeight>> PrepareWeight(std::span<const HostMatrix> parts,
                                                        std::vector<float> bias,
                                                        DType dtype) override;
  void PlanGemm(const PreparedWeight& weight, int64_t x_stride, int64_t y_stride, bool accumulate,
                int64_t max_rows) override;
  int64_t PaddedRows(int64_t rows, int64_t max_rows) const override;
  Result<std::unique_ptr<Buffer>> PrepareVector(std::span<const float> values) override;
  uint64_t KvTileBytes(const KvLayout& layout) const override;
  Status BindPages(const KvLayout& layout, uint32_t num_pages,
                   std::span<const float> inverse_frequencies) override;
  uint32_t AdapterPages(const AdapterSource& source) const override;
  Result<std::unique_ptr<AdapterInstall>> StartInstall(const AdapterSource& source,
                                                       std::span<const PageId> pages) override;
  void BeginStep(Stream* stream, const StepInputs& inputs) override;
  void RunStep(Stream* stream, int64_t rows, int64_t max_rows,
               const std::function<void(int64_t)>& step) override;
  void Embed(Stream* stream, const PreparedWeight& embedding, Tensor y) override;
  void RmsNorm(Stream* stream, Tensor x, const Buffer& weight, int64_t group, float eps,
               Tensor y) override;
  void Gemm(Stream* stream, Tensor x, const PreparedWeight& weight, bool accumulate,
            Tensor y) override;
  void RopeAndStoreKv(Stream* stream, int layer, Tensor qkv) override;
  void PagedAttention(Stream* stream, int layer, Tensor qkv, int window, Tensor y) override;
  void SiluMul(Stream* stream, Tensor gate_up, Tensor y) override;
  void Lora(Stream* stream, Tensor x, std::span<const LoraTarget> targets, Tensor y) override;
  void GatherRows(Stream* stream, Tensor x, std::span<const int32_t> rows, Tensor y) override;
  void Sample(Stream* stream, Tensor logits, std::span<const SampleRow> rows,
              std::span<SampleResult> results) override;

 private:
  CudaBackend() = default;
  cudaStream_t StreamOf(Stream* stream) const;
  void PlanStepLora(const StepInputs& inputs);
  void WriteTables(const StepInputs& inputs, int64_t padded);

  std::string name_;
  int multiprocessors_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t step_queued_ = nullptr;  // after the step queued last: StartInstall waits for it
  std::unique_ptr<GemmLibrary> gemm_;
  LoraGrids lora_grids_;

  KvLayout layout_;
  KvView kv_;
  std::unique_ptr<DeviceBuffer> arena_;
  std::unique_ptr<DeviceBuffer> inverse_frequencies_;
  std::unique_ptr<DeviceBuffer> attention_partial_;
  HostRegistry host_registry_;  // the installer reads it
  std::unique_ptr<AdapterInstaller> installer_;

  // Of the step. `header_` never moves.
  std::unique_ptr<DeviceBuffer> header_;
  std::unique_ptr<StagedTable> header_table_;
  std::unique_ptr<StagedTable> step_table_;
  std::unique_ptr<StagedTable> rows_table_;
  std::unique_ptr<ScratchBuffer> units_;
  std::unique_ptr<ScratchBuffer> counters_;
  std::unique_ptr<ScratchBuffer> h_;
  StepHeader step_;  // the host's copy
  LoraPlan plan_;
  std::vector<LoraPlanSegment> plan_segments_;
  std::vector<AttentionTile> attention_tiles_;
  bool decode_only_ = false;
  bool has_decode_rows_ = false;
  StepGraphs graphs_;

  std::unique_ptr<CudaSampler> sampler_;
};

}  // namespace loraserve
