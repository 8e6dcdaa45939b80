#include <algorithm>
#include <bit>

#include "backend/cuda/attention.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/dense_kernels.h"
#include "backend/cuda/prepared_weight.h"
#include "backend/cuda/row_buckets.h"
#include "base/check.h"

namespace loraserve {

namespace {

const CudaWeight& Cuda(const PreparedWeight& weight) {
  return static_cast<const CudaWeight&>(weight);
}

GemmShape ShapeOf(const CudaWeight& weight, int64_t rows, int64_t x_stride, int64_t y_stride,
                  bool accumulate) {
  return {.rows = rows,
          .n = weight.out_features(),
          .k = weight.in_features(),
          .x_stride = x_stride,
          .weight_stride = weight.stride(),
          .y_stride = y_stride,
          .accumulate = accumulate};
}

template <class T>
T* DataOf(const std::unique_ptr<DeviceBuffer>& buffer) {
  return static_cast<T*>(buffer->data());
}

}  // namespace

Result<std::unique_ptr<CudaBackend>> CudaBackend::Create() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    return Status(StatusCode::kUnavailable,
                  std::string("device: no CUDA device: ") + cudaGetErrorString(error));
  }
  if (devices == 0) return Status(StatusCode::kUnavailable, "device: no CUDA device");
  const Status chosen = CudaStatus(cudaSetDevice(0), "device: CUDA device 0");
  if (!chosen.ok()) return chosen;
  cudaDeviceProp properties;
  LS_CUDA(cudaGetDeviceProperties(&properties, 0));
  if (properties.major < 8) {
    return Status(StatusCode::kFailedPrecondition,
                  "device: " + std::string(properties.name) + " has compute capability " +
                      std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                      ", the kernels need 8.0");
  }
  std::unique_ptr<CudaBackend> backend(new CudaBackend);
  auto gemm = GemmLibrary::Open();
  if (!gemm.ok()) return gemm.status();
  backend->gemm_ = std::move(gemm.value());
  backend->name_ =
      "cuda " + std::string(properties.name) + ", cublasLt " + backend->gemm_->version();
  backend->multiprocessors_ = properties.multiProcessorCount;
  LS_CUDA(cudaStreamCreateWithFlags(&backend->stream_, cudaStreamNonBlocking));
  LS_CUDA(cudaEventCreateWithFlags(&backend->step_queued_, cudaEventDisableTiming));
  backend->lora_grids_ = PrepareLoraKernels(backend->multiprocessors_);
  PrepareDecodeAttention();
  PreparePrefillAttention();
  auto header = DeviceBuffer::Create(sizeof(StepHeader), "device: the step's header");
  if (!header.ok()) return header.status();
  backend->header_ = std::move(header.value());
  auto partial = DeviceBuffer::Create(
      AttentionScratchFloats(backend->multiprocessors_) * sizeof(float), "device: attention");
  if (!partial.ok()) return partial.status();
  backend->attention_partial_ = std::move(partial.value());
  backend->header_table_ = std::make_unique<StagedTable>();
  backend->step_table_ = std::make_unique<StagedTable>();
  backend->rows_table_ = std::make_unique<StagedTable>();
  backend->units_ = std::make_unique<ScratchBuffer>();
  backend->counters_ = std::make_unique<ScratchBuffer>();
  backend->h_ = std::make_unique<ScratchBuffer>();
  backend->sampler_ = std::make_unique<CudaSampler>();
  return Result<std::unique_ptr<CudaBackend>>(std::move(backend));
}

CudaBackend::~CudaBackend() {
  if (stream_ == nullptr) return;
  LS_CUDA(cudaStreamSynchronize(stream_));
  graphs_.Drop();
  installer_.reset();
  LS_CUDA(cudaEventDestroy(step_queued_));
  LS_CUDA(cudaStreamDestroy(stream_));
}

cudaStream_t CudaBackend::StreamOf(Stream* stream) const {
  return stream == nullptr ? stream_ : reinterpret_cast<cudaStream_t>(stream);
}

Result<std::unique_ptr<Buffer>> CudaBackend::Allocate(uint64_t bytes) {
  auto buffer = DeviceBuffer::Create(bytes, "device: activations");
  if (!buffer.ok()) return buffer.status();
  return std::unique_ptr<Buffer>(std::move(buffer.value()));
}

void CudaBackend::Synchronize(Stream* stream) { LS_CUDA(cudaStreamSynchronize(StreamOf(stream))); }

void CudaBackend::CopyToDevice(Stream* stream, const void* host, void* device, uint64_t bytes) {
  LS_CUDA(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, StreamOf(stream)));
}

void CudaBackend::CopyToHost(Stream* stream, const void* device, void* host, uint64_t bytes) {
  LS_CUDA(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, StreamOf(stream)));
}

Result<bool> CudaBackend::RegisterHostMemory(void* memory, uint64_t bytes) {
  const Status status = host_registry_.Register(memory, bytes);
  if (!status.ok()) return status;
  return true;
}

Result<std::unique_ptr<PreparedWeight>> CudaBackend::PrepareWeight(
    std::span<const HostMatrix> parts, std::vector<float> bias, DType) {
  auto weight = CudaWeight::Create(stream_, parts, bias);
  if (!weight.ok()) return weight.status();
  return std::unique_ptr<PreparedWeight>(std::move(weight.value()));
}

Result<std::unique_ptr<Buffer>> CudaBackend::PrepareVector(std::span<const float> values) {
  auto buffer = UploadFloats(stream_, values, "device: a vector");
  if (!buffer.ok()) return buffer.status();
  return std::unique_ptr<Buffer>(std::move(buffer.value()));
}

void CudaBackend::PlanGemm(const PreparedWeight& weight, int64_t x_stride, int64_t y_stride,
                           bool accumulate, int64_t max_rows) {
  const CudaWeight& w = Cuda(weight);
  for (int64_t rows = 0; rows < max_rows;) {
    rows = PaddedRowsOf(rows + 1, max_rows);
    gemm_->Plan(ShapeOf(w, rows, x_stride, y_stride, accumulate || w.bias() != nullptr));
  }
}

int64_t CudaBackend::PaddedRows(int64_t rows, int64_t max_rows) const {
  return PaddedRowsOf(rows, max_rows);
}

uint64_t CudaBackend::KvTileBytes(const KvLayout& layout) const {
  return static_cast<uint64_t>(layout.block_size) * static_cast<uint64_t>(layout.num_kv_heads) *
         static_cast<uint64_t>(layout.head_dim) * 2;
}

Status CudaBackend::BindPages(const KvLayout& layout, uint32_t num_pages,
                              std::span<const float> inverse_frequencies) {
  LS_CHECK(layout.block_size % 16 == 0);
  LS_CHECK(layout.tile_bytes <= layout.page_bytes);
  if (layout.head_dim > kMaxHeadDim || layout.head_dim % 8 != 0) {
    return Status(StatusCode::kInvalidArgument, "head_dim: " + std::to_string(layout.head_dim) +
                                                    " on cuda; it takes multiples of 8 up to " +
                                                    std::to_string(kMaxHeadDim));
  }
  if (layout.page_bytes < kTileBytes || !std::has_single_bit(layout.page_bytes)) {
    return Status(StatusCode::kInvalidArgument, "page_bytes: " + std::to_string(layout.page_bytes) +
                                                    "; cuda needs a power of two, at least " +
                                                    std::to_string(kTileBytes));
  }
  LS_CUDA(cudaStreamSynchronize(stream_));
  graphs_.Drop();
  installer_.reset();
  arena_.reset();
  layout_ = layout;
  const uint64_t bytes = uint64_t{num_pages} * layout.page_bytes;
  auto arena = DeviceBuffer::Create(bytes, "memory_bytes: KV and adapters");
  if (!arena.ok()) return arena.status();
  arena_ = std::move(arena.value());
  auto frequencies = UploadFloats(stream_, inverse_frequencies, "device: rope frequencies");
  if (!frequencies.ok()) return frequencies.status();
  inverse_frequencies_ = std::move(frequencies.value());
  kv_ = {.arena = DataOf<uint8_t>(arena_),
         .page_bytes = layout.page_bytes,
         .tile_bytes = layout.tile_bytes,
         .tiles_per_page = layout.tiles_per_page,
         .pages_per_block = layout.pages_per_block,
         .block_size = layout.block_size,
         .num_heads = layout.num_heads,
         .num_kv_heads = layout.num_kv_heads,
         .head_dim = layout.head_dim};
  installer_ = std::make_unique<AdapterInstaller>(kv_.arena, layout.page_bytes, &host_registry_);
  return Status();
}

uint32_t CudaBackend::AdapterPages(const AdapterSource& source) const {
  const uint64_t bytes = AdapterTiles(source) * kTileBytes;
  return static_cast<uint32_t>((bytes + layout_.page_bytes - 1) / layout_.page_bytes);
}

Result<std::unique_ptr<AdapterInstall>> CudaBackend::StartInstall(const AdapterSource& source,
                                                                  std::span<const PageId> pages) {
  return installer_->Start(source, pages, step_queued_);
}

void CudaBackend::PlanStepLora(const StepInputs& inputs) {
  plan_segments_.clear();
  step_.num_lora_layers = 0;
  for (const LoraSegment& segment : inputs.segments) {
    if (segment.adapter == nullptr || segment.row_count == 0) continue;
    const auto& adapter = static_cast<const CudaAdapter&>(*segment.adapter);
    plan_segments_.push_back({.row_begin = segment.row_begin,
                              .row_count = segment.row_count,
                              .adapter = adapter.device(),
                              .largest = adapter.largest()});
    step_.num_lora_layers =
        std::max(step_.num_lora_layers, static_cast<int32_t>(adapter.num_layers()));
  }
  PlanLora(plan_segments_, plan_);
  step_.num_entries = static_cast<int32_t>(plan_.entries.size());
  std::copy(plan_.groups.begin(), plan_.groups.end(), step_.groups);
}

void CudaBackend::WriteTables(const StepInputs& inputs, int64_t padded) {
  const auto rows = static_cast<size_t>(padded);
  attention_tiles_.clear();
  const int positions = layout_.num_kv_heads == 0
                            ? 1
                            : AttentionTilePositions(layout_.num_heads / layout_.num_kv_heads);
  for (size_t s = 0; s < inputs.sequences.size(); ++s) {
    if (inputs.sequences[s].row_count <= 1) continue;
    for (int32_t row = 0; row < inputs.sequences[s].row_count; row += positions) {
      attention_tiles_.push_back({static_cast<int32_t>(s), row});
    }
  }
  const uint64_t bytes = rows * 12 + inputs.sequences.size_bytes() +
                         inputs.block_pages.size_bytes() +
                         attention_tiles_.size() * sizeof(AttentionTile) +
                         plan_.entries.size() * sizeof(LoraEntry) + 8 * 16;
  step_table_->Begin(bytes, stream_);
  // Copies `from` and pads with `rest`; the address is the device's.
  const auto add = [&](auto from, size_t count, auto rest) {
    auto* const to = step_table_->Add<std::remove_cv_t<decltype(rest)>>(count);
    std::copy(from.begin(), from.end(), to);
    std::fill(to + from.size(), to + count, rest);
    return step_table_->device(to);
  };
  step_.token_ids = add(inputs.token_ids, rows, int32_t{0});
  step_.positions = add(inputs.positions, rows, int32_t{0});
  auto* const row_sequence = step_table_->Add<int32_t>(rows);
  std::fill_n(row_sequence, rows, -1);
  for (size_t s = 0; s < inputs.sequences.size(); ++s) {
    const SequenceSpan& sequence = inputs.sequences[s];
    std::fill_n(row_sequence + sequence.row_begin, sequence.row_count, static_cast<int32_t>(s));
  }
  step_.row_sequence = step_table_->device(row_sequence);
  step_.sequences = add(inputs.sequences, inputs.sequences.size(), SequenceSpan{});
  step_.block_pages = add(inputs.block_pages, inputs.block_pages.size(), PageId{0});
  step_.attention_tiles =
      add(std::span(attention_tiles_), attention_tiles_.size(), AttentionTile{});
  step_.num_attention_tiles = static_cast<int32_t>(attention_tiles_.size());
  step_.entries = add(std::span(plan_.entries), plan_.entries.size(), LoraEntry{});
  step_table_->Commit(stream_);
}

void CudaBackend::BeginStep(Stream*, const StepInputs& inputs) {
  const auto rows =
      static_cast<int64_t>(std::max(inputs.token_ids.size(), inputs.positions.size()));
  decode_only_ = !inputs.sequences.empty();
  has_decode_rows_ = false;
  for (const SequenceSpan& sequence : inputs.sequences) {
    decode_only_ = decode_only_ && sequence.row_count == 1;
    has_decode_rows_ = has_decode_rows_ || sequence.row_count == 1;
  }
  PlanStepLora(inputs);
  WriteTables(inputs, PaddedRowsOf(rows, INT64_MAX));  // RunStep may have room for fewer
  const auto layers = static_cast<uint64_t>(step_.num_lora_layers);
  const uint64_t ready = layers * plan_.entries.size();
  step_.units =
      static_cast<LoraUnit*>(units_->Reserve(plan_.num_units * sizeof(LoraUnit), stream_));
  step_.ready = static_cast<uint32_t*>(
      counters_->Reserve((ready + layers * kNumLoraGroups) * sizeof(uint32_t), stream_));
  step_.tickets = step_.ready + ready;
  step_.h = static_cast<float*>(h_->Reserve(plan_.h_floats * sizeof(float), stream_));
  header_table_->Begin(sizeof(StepHeader), stream_);
  *header_table_->Add<StepHeader>(1) = step_;
  header_table_->CommitTo(DataOf<StepHeader>(header_), stream_);
  if (!plan_.entries.empty()) MakeWorkList(stream_, DataOf<StepHeader>(header_));
}

void CudaBackend::RunStep(Stream* stream, int64_t rows, int64_t max_rows,
                          const std::function<void(int64_t)>& step) {
  const cudaStream_t on = StreamOf(stream);
  const int64_t padded = PaddedRowsOf(rows, max_rows);
  if (decode_only_) {
    // What its LoRA launches are: none, short runs, long runs.
    const int lora = plan_.entries.empty() ? 0 : (plan_.token_tile == kDecodeTokens ? 1 : 2);
    graphs_.Run(on, padded, lora, step);
  } else {
    step(padded);
  }
  LS_CUDA(cudaEventRecord(step_queued_, on));
}

void CudaBackend::Embed(Stream* stream, const PreparedWeight& embedding, Tensor y) {
  const CudaWeight& weight = Cuda(embedding);
  RunEmbed(StreamOf(stream), DataOf<StepHeader>(header_), weight.data(), weight.stride(), y);
}

void CudaBackend::RmsNorm(Stream* stream, Tensor x, const Buffer& weight, int64_t group, float eps,
                          Tensor y) {
  const auto* const values =
      static_cast<const float*>(static_cast<const DeviceBuffer&>(weight).data());
  RunRmsNorm(StreamOf(stream), x, values, group, eps, y);
}

void CudaBackend::Gemm(Stream* stream, Tensor x, const PreparedWeight& weight, bool accumulate,
                       Tensor y) {
  if (x.rows == 0) return;
  const CudaWeight& w = Cuda(weight);
  const cudaStream_t on = StreamOf(stream);
  if (w.bias() != nullptr && !accumulate) {
    y.cols = w.out_features();
    RunFillRows(on, w.bias(), y);
    accumulate = true;
  }
  gemm_->Run(on, ShapeOf(w, x.rows, x.stride, y.stride, accumulate),
             static_cast<const uint16_t*>(x.data), w.data(), static_cast<uint16_t*>(y.data));
}

void CudaBackend::RopeAndStoreKv(Stream* stream, int layer, Tensor qkv) {
  RunRopeAndStoreKv(StreamOf(stream), DataOf<StepHeader>(header_), kv_, layer,
                    DataOf<float>(inverse_frequencies_), qkv);
}

void CudaBackend::PagedAttention(Stream* stream, int layer, Tensor qkv, int window, Tensor y) {
  const cudaStream_t on = StreamOf(stream);
  const auto* const step = DataOf<StepHeader>(header_);
  if (has_decode_rows_) {
    RunDecodeAttention(on, step, kv_, layer, window, multiprocessors_,
                       DataOf<float>(attention_partial_), qkv, y);
  }
  RunPrefillAttention(on, step, kv_, layer, window, step_.num_attention_tiles, qkv, y);
}

void CudaBackend::SiluMul(Stream* stream, Tensor gate_up, Tensor y) {
  RunSiluMul(StreamOf(stream), gate_up, y);
}

void CudaBackend::Lora(Stream* stream, Tensor x, std::span<const LoraTarget> targets, Tensor y) {
  if (plan_.entries.empty() || targets.empty()) return;
  static constexpr int kFirstModules[kNumLoraGroups] = {0, 3, 4, 6};
  const int group = LoraGroupOf(static_cast<int>(targets[0].module));
  LoraLaunch launch;
  launch.step = DataOf<StepHeader>(header_);
  launch.layer = targets[0].layer;
  launch.group = group;
  launch.first_module = kFirstModules[group];
  launch.x = static_cast<const uint16_t*>(x.data);
  launch.x_stride = x.stride;
  launch.y = static_cast<uint16_t*>(y.data);
  launch.y_stride = y.stride;
  for (const LoraTarget& target : targets) {
    LS_CHECK(target.layer == launch.layer);
    LS_CHECK(LoraGroupOf(static_cast<int>(target.module)) == group);
    launch.column[static_cast<int>(target.module) - launch.first_module] = target.column;
  }
  RunLora(StreamOf(stream), lora_grids_, plan_.token_tile, launch);
}

void CudaBackend::GatherRows(Stream* stream, Tensor x, std::span<const int32_t> rows, Tensor y) {
  const cudaStream_t on = StreamOf(stream);
  rows_table_->Begin(rows.size_bytes(), on);
  auto* const host = rows_table_->Add<int32_t>(rows.size());
  std::copy(rows.begin(), rows.end(), host);
  rows_table_->Commit(on);
  RunGatherRows(on, x, rows_table_->device(host), y);
}

void CudaBackend::Sample(Stream* stream, Tensor logits, std::span<const SampleRow> rows,
                         std::span<SampleResult> results) {
  sampler_->Sample(StreamOf(stream), logits, rows, results);
}

}  // namespace loraserve
