// What the benchmarks of the CUDA backend share: a device with its clock and its ceiling,
// activations, and adapters of any ranks.
//
// Times are the device's own, between two events on the backend's stream, and each is taken after
// other memory has been read through the caches, and with all of its work queued. With the backend
// emulated all of it is a rehearsal: small, once, and its numbers mean nothing.
#pragma once

#include <benchmark/benchmark.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/cuda_backend.h"

namespace loraserve::bench {

#ifdef LORASERVE_CUDA_EMULATED
inline constexpr bool kRehearsal = true;
#else
inline constexpr bool kRehearsal = false;
#endif
inline constexpr int kIterations = kRehearsal ? 1 : 20;
inline constexpr std::array kRanks = {8, 16, 32, 64, 128};

struct Memory {
  std::unique_ptr<Buffer> buffer;
  Tensor tensor;
  Tensor Rows(int64_t rows) const { return {tensor.data, rows, tensor.cols, tensor.stride}; }
};

class Device {
 public:
  // kUnavailable and the like where there is none.
  static Result<std::unique_ptr<Device>> Open();
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  CudaBackend& backend() { return *backend_; }
  // What reading memory reaches, measured when it was opened.
  double read_bytes_per_second() const { return read_bytes_per_second_; }
  // Seconds between the begin and the end of what `queue` queues. `prepare` comes before, untimed.
  // The caches are emptied first, for as long as the host needs to queue all that follows: if the
  // device came to the begin earlier, both are called again after twice the reading. A case whose
  // work was not queued in time even so fails; its counter "reads" tells how much was needed.
  double Seconds(const std::function<void()>& prepare, const std::function<void()>& queue);

  Memory Upload(std::span<const uint16_t> values, int64_t rows, int64_t cols);
  Memory Zeros(int64_t rows, int64_t cols);
  std::vector<uint16_t> Download(const Tensor& tensor);  // [rows][cols]

 private:
  Device() = default;
  double ReadSeconds();

  std::unique_ptr<CudaBackend> backend_;
  std::unique_ptr<Buffer> cold_, sink_;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  double read_bytes_per_second_ = 0;
};

// (in, out) of a layer's seven modules, and the modules that share their input.
using ModuleShapes = std::array<std::pair<int64_t, int64_t>, kNumLinearModules>;
inline constexpr std::array<std::pair<int, int>, 4> kModuleGroups = {
    {{0, 3}, {3, 4}, {4, 6}, {6, 7}}};
ModuleShapes ShapesOf(int64_t hidden, int64_t kv_size, int64_t intermediate);

// An adapter of all modules of so many layers; `a` and `b` are bfloat16 and serve all of them.
AdapterSource SourceOf(const ModuleShapes& shapes, int layers, int rank, float scaling,
                       const uint16_t* a, const uint16_t* b);
uint64_t PagesOf(const Backend& backend, std::span<const AdapterSource> sources);
// Installs into pages from `first_page` on, each adapter's in descending order: not contiguous.
std::vector<std::unique_ptr<InstalledAdapter>> InstallAll(Backend& backend,
                                                          std::span<const AdapterSource> sources,
                                                          uint32_t first_page);

// KV tiles of this shape in pages of a power of two, of `page_bytes` at least.
KvLayout LayoutOf(const Backend& backend, int layers, int heads, int kv_heads, int head_dim,
                  uint64_t page_bytes);

// What `result` holds; ends the process with its message where it holds nothing.
template <class T>
T Value(Result<T> result) {
  if (!result.ok()) {
    std::fprintf(stderr, "%s\n", result.status().message().c_str());
    std::exit(2);
  }
  return std::move(result.value());
}
void Require(const Status& status);

// A case whose result was not what it must be: it is reported, and Main returns 1.
void Fail(benchmark::State& state, const std::string& message);
// Registers cases that time themselves, each with its arguments and kIterations iterations.
void Register(const std::string& name, const std::vector<std::string>& arguments,
              const std::vector<std::vector<int64_t>>& cases,
              const std::function<void(benchmark::State&)>& run);
// Opens the device, registers the cases and runs them: 2 without a device, 1 if a case failed.
int Main(int argc, char** argv, const std::function<void(Device&)>& register_all);

}  // namespace loraserve::bench
