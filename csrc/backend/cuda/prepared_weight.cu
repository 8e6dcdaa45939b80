#include <algorithm>
#include <cstring>

#include "backend/cuda/prepared_weight.h"

namespace loraserve {

namespace {

void ConvertRow(const HostMatrix& from, int64_t row, uint16_t* to) {
  if (from.dtype == DType::kBF16) {
    std::memcpy(to, static_cast<const uint16_t*>(from.data) + row * from.cols,
                static_cast<size_t>(from.cols) * 2);
    return;
  }
  for (int64_t i = 0; i < from.cols; ++i) to[i] = F32ToBF16(from.at(row, i));
}

}  // namespace

Result<std::unique_ptr<CudaWeight>> CudaWeight::Create(cudaStream_t stream,
                                                       std::span<const HostMatrix> parts,
                                                       std::span<const float> bias) {
  auto weight = std::make_unique<CudaWeight>();
  weight->in_features_ = parts[0].cols;
  weight->stride_ = (weight->in_features_ + 7) / 8 * 8;
  for (const HostMatrix& part : parts) weight->out_features_ += part.rows;
  auto memory = DeviceBuffer::Create(static_cast<uint64_t>(weight->bytes()), "device: a weight");
  if (!memory.ok()) return memory.status();
  weight->memory_ = std::move(memory.value());
  auto* to = static_cast<uint16_t*>(static_cast<Buffer&>(*weight->memory_).data());
  constexpr int64_t kChunkElements = 8 << 20;
  const int64_t chunk_rows = std::max<int64_t>(1, kChunkElements / weight->stride_);
  std::vector<uint16_t> chunk;
  for (const HostMatrix& part : parts) {
    for (int64_t begin = 0; begin < part.rows; begin += chunk_rows) {
      const int64_t count = std::min(chunk_rows, part.rows - begin);
      chunk.assign(static_cast<size_t>(count * weight->stride_), 0);
      for (int64_t row = 0; row < count; ++row) {
        ConvertRow(part, begin + row, chunk.data() + row * weight->stride_);
      }
      LS_CUDA(cudaMemcpyAsync(to, chunk.data(), chunk.size() * 2, cudaMemcpyHostToDevice, stream));
      LS_CUDA(cudaStreamSynchronize(stream));
      to += count * weight->stride_;
    }
  }
  if (!bias.empty()) {
    auto values = UploadFloats(stream, bias, "device: a bias");
    if (!values.ok()) return values.status();
    weight->bias_ = std::move(values.value());
  }
  return Result<std::unique_ptr<CudaWeight>>(std::move(weight));
}

Result<std::unique_ptr<DeviceBuffer>> UploadFloats(cudaStream_t stream,
                                                   std::span<const float> values,
                                                   const std::string& what) {
  auto buffer = DeviceBuffer::Create(values.size_bytes(), what);
  if (!buffer.ok() || values.empty()) return buffer;
  LS_CUDA(cudaMemcpyAsync(static_cast<Buffer&>(*buffer.value()).data(), values.data(),
                          values.size_bytes(), cudaMemcpyHostToDevice, stream));
  LS_CUDA(cudaStreamSynchronize(stream));
  return buffer;
}

}  // namespace loraserve
