#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backend/cpu/host_memory.h"
#include "base/check.h"

namespace loraserve {

namespace {

// Below this many multiply-adds a region is not worth waking the other threads.
constexpr int64_t kParallelCost = 1 << 15;

float* Row(const Tensor& t, int64_t row) { return static_cast<float*>(t.data) + row * t.stride; }

// At least `floats` floats, those of one share.
float* Scratch(std::vector<std::vector<float>>& by_share, int share, int64_t floats) {
  std::vector<float>& scratch = by_share[static_cast<size_t>(share)];
  if (scratch.size() < static_cast<size_t>(floats)) scratch.resize(static_cast<size_t>(floats));
  return scratch.data();
}

const CpuWeight& Cpu(const PreparedWeight& weight) { return static_cast<const CpuWeight&>(weight); }

}  // namespace

CpuBackend::CpuBackend(const CpuBackendOptions& options)
    : options_(options), kernels_(SelectKernels(options.isa.c_str())), pool_(options.threads) {
  gemm_scratch_.resize(static_cast<size_t>(pool_.size()));
  attention_.resize(static_cast<size_t>(pool_.size()));
  sampler_scratch_.resize(static_cast<size_t>(pool_.size()));
}

std::string CpuBackend::name() const {
  const bool rounded = options_.activation_dtype == DType::kBF16;
  return std::string("cpu ") + kernels_.name + (rounded ? ", activations bfloat16" : "");
}

template <class Function>
void CpuBackend::Split(int64_t units, int64_t cost, Function&& function) {
  if (units <= 1 || units * cost < kParallelCost || pool_.size() == 1) {
    return function(0, units, 0);
  }
  pool_.Run([&](int share) {
    const int64_t begin = units * share / pool_.size();
    const int64_t end = units * (share + 1) / pool_.size();
    if (begin < end) function(begin, end, share);
  });
}

Result<std::unique_ptr<Buffer>> CpuBackend::Allocate(uint64_t bytes) {
  std::unique_ptr<Buffer> buffer = HostBuffer::Create(bytes);
  if (buffer == nullptr) {
    return Status(StatusCode::kResourceExhausted, "memory: " + std::to_string(bytes) + " bytes");
  }
  return buffer;
}

void CpuBackend::CopyToDevice(Stream*, const void* host, void* device, uint64_t bytes) {
  std::memcpy(device, host, bytes);
}

void CpuBackend::CopyToHost(Stream*, const void* device, void* host, uint64_t bytes) {
  std::memcpy(host, device, bytes);
}

Result<std::unique_ptr<PreparedWeight>> CpuBackend::PrepareWeight(std::span<const HostMatrix> parts,
                                                                  std::vector<float> bias,
                                                                  DType dtype) {
  auto weight = CpuWeight::Create(parts, std::move(bias), dtype);
  if (!weight.ok()) return weight.status();
  return std::unique_ptr<PreparedWeight>(std::move(weight.value()));
}

Result<std::unique_ptr<Buffer>> CpuBackend::PrepareVector(std::span<const float> values) {
  auto buffer = Allocate(values.size_bytes());
  if (buffer.ok()) std::memcpy(buffer.value()->data(), values.data(), values.size_bytes());
  return buffer;
}

uint64_t CpuBackend::KvTileBytes(const KvLayout& layout) const {
  const uint64_t padded = static_cast<uint64_t>(layout.head_dim + 15) / 16 * 16;
  return static_cast<uint64_t>(layout.block_size) * static_cast<uint64_t>(layout.num_kv_heads) *
         padded * sizeof(float);
}

Status CpuBackend::BindPages(const KvLayout& layout, uint32_t num_pages,
                             std::span<const float> inverse_frequencies) {
  LS_CHECK(layout.block_size % 16 == 0);
  LS_CHECK(layout.tile_bytes <= layout.page_bytes);
  layout_ = layout;
  padded_head_dim_ = (layout.head_dim + 15) / 16 * 16;
  inverse_frequencies_.assign(inverse_frequencies.begin(), inverse_frequencies.end());
  const uint64_t bytes = uint64_t{num_pages} * layout.page_bytes;
  // Linux hands out addresses beyond what it has, and kills who uses them.
  const uint64_t available = HostMemoryBytes();
  if (bytes > available) {
    return Status(StatusCode::kResourceExhausted, "memory_bytes: " + std::to_string(bytes) +
                                                      ", this machine has " +
                                                      std::to_string(available));
  }
  pages_ = HostBuffer::Create(bytes);
  if (pages_ == nullptr) {
    return Status(StatusCode::kResourceExhausted,
                  "memory_bytes: no memory for " + std::to_string(bytes) + " bytes of pages");
  }
  return Status();
}

DType CpuBackend::StoredDType(const AdapterSource& source) const {
  if (options_.adapter_dtype) return *options_.adapter_dtype;
  for (const AdapterModuleSource& module : source.modules) {
    if (module.a.dtype != DType::kBF16 || module.b.dtype != DType::kBF16) return DType::kF32;
  }
  return DType::kBF16;
}

uint32_t CpuBackend::AdapterPages(const AdapterSource& source) const {
  const uint64_t bytes = CpuAdapter::Bytes(source, StoredDType(source));
  return static_cast<uint32_t>((bytes + layout_.page_bytes - 1) / layout_.page_bytes);
}

Result<std::unique_ptr<AdapterInstall>> CpuBackend::StartInstall(const AdapterSource& source,
                                                                 std::span<const PageId> pages) {
  return CpuAdapter::StartInstall(source, StoredDType(source),
                                  static_cast<std::byte*>(pages_->HostBuffer::data()),
                                  layout_.page_bytes, pages);
}

void CpuBackend::BeginStep(Stream*, const StepInputs& inputs) {
  inputs_ = inputs;
  const size_t half = inverse_frequencies_.size();
  const size_t rows = inputs.positions.size();
  cos_.resize(rows * half);
  sin_.resize(rows * half);
  Split(
      static_cast<int64_t>(rows), static_cast<int64_t>(half) * 64, [&](int64_t b, int64_t e, int) {
        for (size_t row = static_cast<size_t>(b); row < static_cast<size_t>(e); ++row) {
          for (size_t i = 0; i < half; ++i) {
            // In float32 as the reference model computes it, or far positions would differ.
            const float angle = static_cast<float>(inputs.positions[row]) * inverse_frequencies_[i];
            cos_[row * half + i] = std::cos(angle);
            sin_[row * half + i] = std::sin(angle);
          }
        }
      });
}

void CpuBackend::Embed(Stream*, const PreparedWeight& embedding, Tensor y) {
  const CpuWeight& weight = Cpu(embedding);
  for (int64_t row = 0; row < y.rows; ++row) {
    weight.CopyRow(inputs_.token_ids[static_cast<size_t>(row)], Row(y, row));
  }
}

void CpuBackend::RmsNorm(Stream*, Tensor x, const Buffer& weight, int64_t group, float eps,
                         Tensor y) {
  const auto* const w = static_cast<const float*>(static_cast<const HostBuffer&>(weight).data());
  Split(x.rows, x.cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < x.cols; column += group) {
        kernels_.rms_norm(Row(x, row) + column, w, group, eps, Row(y, row) + column);
      }
    }
  });
}

void CpuBackend::Gemm(Stream*, Tensor x, const PreparedWeight& weight, bool accumulate, Tensor y) {
  const CpuWeight& w = Cpu(weight);
  GemmArgs args{.x = Row(x, 0),
                .x_stride = x.stride,
                .rows = x.rows,
                .k = w.in_features(),
                .weight = w.panels(),
                .bfloat16 = w.bfloat16(),
                .bias = w.bias(),
                .accumulate = accumulate,
                .y = Row(y, 0),
                .y_stride = y.stride};
  Split(w.num_panels(), 16 * args.k * x.rows, [&](int64_t begin, int64_t end, int share) {
    GemmArgs part = args;
    part.scratch = Scratch(gemm_scratch_, share, GemmScratch(x.rows, args.k));
    part.panel_begin = begin;
    part.panel_end = end;
    // Rounding has no part in products with float32 weights.
    const bool rounded = options_.activation_dtype == DType::kBF16 && w.bfloat16();
    (rounded ? kernels_.rounded_gemm : kernels_.gemm)(part);
  });
}

float* CpuBackend::BlockTile(const SequenceSpan& sequence, int block, int layer, bool values,
                             int head) const {
  const int tile = 2 * layer + (values ? 1 : 0);
  const int page =
      sequence.page_begin + block * layout_.pages_per_block + tile / layout_.tiles_per_page;
  const uint64_t offset = inputs_.block_pages[static_cast<size_t>(page)] * layout_.page_bytes +
                          static_cast<uint64_t>(tile % layout_.tiles_per_page) * layout_.tile_bytes;
  auto* const tile_data =
      reinterpret_cast<float*>(static_cast<std::byte*>(pages_->HostBuffer::data()) + offset);
  return tile_data + static_cast<int64_t>(head) * layout_.block_size * padded_head_dim_;
}

void CpuBackend::RopeAndStoreKv(Stream*, int layer, Tensor qkv) {
  const int64_t half = layout_.head_dim / 2;
  const int D = padded_head_dim_;
  const auto one_row = [&](const SequenceSpan& sequence, int64_t row) {
    float* const values = Row(qkv, row);
    const float* const cos = cos_.data() + row * half;
    const float* const sin = sin_.data() + row * half;
    for (int head = 0; head < layout_.num_heads + layout_.num_kv_heads; ++head) {
      kernels_.rope(values + int64_t{head} * layout_.head_dim, cos, sin, half);
    }
    const int position =
        sequence.context_length - sequence.row_count + static_cast<int>(row - sequence.row_begin);
    const int block = position / layout_.block_size;
    const int within = position % layout_.block_size;
    const float* k = values + int64_t{layout_.num_heads} * layout_.head_dim;
    const float* v = k + int64_t{layout_.num_kv_heads} * layout_.head_dim;
    for (int head = 0; head < layout_.num_kv_heads; ++head) {
      float* const keys = BlockTile(sequence, block, layer, false, head) + within / 16 * D * 16;
      float* const vals = BlockTile(sequence, block, layer, true, head);
      for (int d = 0; d < D; ++d) {
        const bool real = d < layout_.head_dim;
        keys[d * 16 + within % 16] = real ? k[d] : 0.0f;
        vals[(d / 16 * layout_.block_size + within) * 16 + d % 16] = real ? v[d] : 0.0f;
      }
      k += layout_.head_dim;
      v += layout_.head_dim;
    }
  };
  Split(qkv.rows, qkv.cols * 4, [&](int64_t begin, int64_t end, int) {
    for (const SequenceSpan& sequence : inputs_.sequences) {
      const int64_t last = std::min<int64_t>(end, sequence.row_begin + sequence.row_count);
      for (int64_t row = std::max<int64_t>(begin, sequence.row_begin); row < last; ++row) {
        one_row(sequence, row);
      }
    }
  });
}

void CpuBackend::SiluMul(Stream*, Tensor gate_up, Tensor y) {
  Split(y.rows, y.cols * 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      kernels_.silu_mul(Row(gate_up, row), Row(gate_up, row) + y.cols, y.cols, Row(y, row));
    }
  });
}

void CpuBackend::GatherRows(Stream*, Tensor x, std::span<const int32_t> rows, Tensor y) {
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(Row(y, static_cast<int64_t>(i)), Row(x, rows[i]),
                static_cast<size_t>(x.cols) * sizeof(float));
  }
}

void CpuBackend::Sample(Stream*, Tensor logits, std::span<const SampleRow> rows,
                        std::span<SampleResult> results) {
  pool_.ParallelFor(static_cast<int64_t>(rows.size()), [&](int64_t row, int worker) {
    const std::span<const float> values(Row(logits, row), static_cast<size_t>(logits.cols));
    results[static_cast<size_t>(row)] =
        SampleToken(kernels_, values, rows[static_cast<size_t>(row)],
                    sampler_scratch_[static_cast<size_t>(worker)]);
  });
}

}  // namespace loraserve
