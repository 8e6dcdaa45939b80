#include "cuda_bench.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "cuda_read.h"

namespace loraserve::bench {

namespace {

constexpr uint64_t kColdBytes = kRehearsal ? 1 << 16 : 1 << 30;  // many times a cache
constexpr int kBlockSize = 16;
constexpr int kMostReads = 64;
bool failed = false;
// Of the case that runs: reads before a measurement, and whether even the most ended too early.
int reads = 1;
bool late = false;

// Whether the device has come to it. Emulated it always has, and nothing is made of that.
bool Passed(cudaEvent_t event) {
  if constexpr (kRehearsal) return false;
  const cudaError_t error = cudaEventQuery(event);
  if (error == cudaErrorNotReady) return false;
  LS_CUDA(error);
  return true;
}

}  // namespace

Result<std::unique_ptr<Device>> Device::Open() {
  auto backend = CudaBackend::Create();
  if (!backend.ok()) return backend.status();
  std::unique_ptr<Device> device(new Device);
  device->backend_ = std::move(backend.value());
  for (auto& [buffer, bytes] :
       {std::pair(&device->cold_, kColdBytes), std::pair(&device->sink_, sizeof(uint32_t))}) {
    auto memory = device->backend_->Allocate(bytes);
    if (!memory.ok()) return memory.status();
    *buffer = std::move(memory.value());
  }
  LS_CUDA(cudaEventCreateWithFlags(&device->begin_, cudaEventDefault));
  LS_CUDA(cudaEventCreateWithFlags(&device->end_, cudaEventDefault));
  LS_CUDA(cudaMemsetAsync(device->cold_->data(), 0, kColdBytes, device->backend_->stream()));
  std::vector<double> seconds;
  for (int i = 0; i < kIterations + 1; ++i) seconds.push_back(device->ReadSeconds());
  if (late) return Status(StatusCode::kUnavailable, "the host is too slow to queue one launch");
  std::nth_element(seconds.begin(), seconds.begin() + kIterations / 2, seconds.end());
  device->read_bytes_per_second_ =
      static_cast<double>(kColdBytes) / seconds[static_cast<size_t>(kIterations / 2)];
  return Result<std::unique_ptr<Device>>(std::move(device));
}

Device::~Device() {
  backend_->Synchronize(nullptr);
  if (begin_ != nullptr) LS_CUDA(cudaEventDestroy(begin_));
  if (end_ != nullptr) LS_CUDA(cudaEventDestroy(end_));
}

double Device::ReadSeconds() {
  return Seconds([] {},
                 [this] {
                   ReadThrough(backend_->stream(), cold_->data(), kColdBytes,
                               static_cast<uint32_t*>(sink_->data()), backend_->multiprocessors());
                 });
}

double Device::Seconds(const std::function<void()>& prepare, const std::function<void()>& queue) {
  const cudaStream_t stream = backend_->stream();
  for (;;) {
    for (int i = 0; i < reads; ++i) {
      ReadThrough(stream, cold_->data(), kColdBytes, static_cast<uint32_t*>(sink_->data()),
                  backend_->multiprocessors());
    }
    prepare();
    LS_CUDA(cudaEventRecord(begin_, stream));
    queue();
    LS_CUDA(cudaEventRecord(end_, stream));
    const bool ahead = !Passed(begin_);
    LS_CUDA(cudaEventSynchronize(end_));
    if (!ahead && reads < kMostReads) {
      reads *= 2;
      continue;
    }
    late = late || !ahead;
    float milliseconds = 0.0f;
    LS_CUDA(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return std::max(1e-3 * static_cast<double>(milliseconds), 1e-9);
  }
}

Memory Device::Upload(std::span<const uint16_t> values, int64_t rows, int64_t cols) {
  const int64_t stride = backend_->RowStride(cols);
  std::vector<uint16_t> padded(static_cast<size_t>(rows * stride));
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(values.begin() + row * cols, cols, padded.begin() + row * stride);
  }
  const uint64_t bytes = padded.size() * sizeof(uint16_t);
  Memory memory{.buffer = Value(backend_->Allocate(bytes))};
  memory.tensor = {memory.buffer->data(), rows, cols, stride};
  backend_->CopyToDevice(nullptr, padded.data(), memory.tensor.data, bytes);
  backend_->Synchronize(nullptr);
  return memory;
}

Memory Device::Zeros(int64_t rows, int64_t cols) {
  const int64_t stride = backend_->RowStride(cols);
  const auto bytes = static_cast<uint64_t>(rows * stride) * sizeof(uint16_t);
  Memory memory{.buffer = Value(backend_->Allocate(bytes))};
  memory.tensor = {memory.buffer->data(), rows, cols, stride};
  LS_CUDA(cudaMemsetAsync(memory.tensor.data, 0, bytes, backend_->stream()));
  return memory;
}

std::vector<uint16_t> Device::Download(const Tensor& tensor) {
  std::vector<uint16_t> padded(static_cast<size_t>(tensor.rows * tensor.stride));
  backend_->CopyToHost(nullptr, tensor.data, padded.data(), padded.size() * sizeof(uint16_t));
  backend_->Synchronize(nullptr);
  if (tensor.stride == tensor.cols) return padded;
  std::vector<uint16_t> values(static_cast<size_t>(tensor.rows * tensor.cols));
  for (int64_t row = 0; row < tensor.rows; ++row) {
    std::copy_n(padded.begin() + row * tensor.stride, tensor.cols,
                values.begin() + row * tensor.cols);
  }
  return values;
}

ModuleShapes ShapesOf(int64_t hidden, int64_t kv_size, int64_t intermediate) {
  return {{{hidden, hidden},
           {hidden, kv_size},
           {hidden, kv_size},
           {hidden, hidden},
           {hidden, intermediate},
           {hidden, intermediate},
           {intermediate, hidden}}};
}

AdapterSource SourceOf(const ModuleShapes& shapes, int layers, int rank, float scaling,
                       const uint16_t* a, const uint16_t* b) {
  AdapterSource source;
  for (int layer = 0; layer < layers; ++layer) {
    for (int m = 0; m < kNumLinearModules; ++m) {
      const auto& [in, out] = shapes[static_cast<size_t>(m)];
      source.modules.push_back({.layer = layer,
                                .module = static_cast<LinearModule>(m),
                                .rank = rank,
                                .scaling = scaling,
                                .a = {a, DType::kBF16, rank, in},
                                .b = {b, DType::kBF16, rank, out}});
    }
  }
  return source;
}

uint64_t PagesOf(const Backend& backend, std::span<const AdapterSource> sources) {
  uint64_t pages = 0;
  for (const AdapterSource& source : sources) pages += backend.AdapterPages(source);
  return pages;
}

std::vector<std::unique_ptr<InstalledAdapter>> InstallAll(Backend& backend,
                                                          std::span<const AdapterSource> sources,
                                                          uint32_t first_page) {
  std::vector<std::unique_ptr<InstalledAdapter>> installed;
  for (const AdapterSource& source : sources) {
    std::vector<PageId> pages(backend.AdapterPages(source));
    std::iota(pages.rbegin(), pages.rend(), first_page);
    first_page += static_cast<uint32_t>(pages.size());
    installed.push_back(Value(backend.InstallAdapter(source, pages)));
  }
  return installed;
}

KvLayout LayoutOf(const Backend& backend, int layers, int heads, int kv_heads, int head_dim,
                  uint64_t page_bytes) {
  KvLayout layout{.num_layers = layers,
                  .num_heads = heads,
                  .num_kv_heads = kv_heads,
                  .head_dim = head_dim,
                  .block_size = kBlockSize};
  layout.tile_bytes = backend.KvTileBytes(layout);
  layout.page_bytes = std::bit_ceil(std::max(layout.tile_bytes, page_bytes));
  layout.tiles_per_page = static_cast<int>(layout.page_bytes / layout.tile_bytes);
  layout.pages_per_block = (2 * layers + layout.tiles_per_page - 1) / layout.tiles_per_page;
  return layout;
}

void Require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(2);
}

void Fail(benchmark::State& state, const std::string& message) {
  failed = true;
  state.SkipWithError(message.c_str());
}

void Register(const std::string& name, const std::vector<std::string>& arguments,
              const std::vector<std::vector<int64_t>>& cases,
              const std::function<void(benchmark::State&)>& run) {
  const auto whole = [run](benchmark::State& state) {
    reads = 1;
    late = false;
    run(state);
    state.counters["reads"] = reads;
    if (late) Fail(state, "the device waited for the host to queue its work");
  };
  auto* const registered = benchmark::RegisterBenchmark(name.c_str(), whole);
  registered->ArgNames(arguments)->UseManualTime()->Iterations(kIterations);
  registered->Unit(benchmark::kMicrosecond);
  for (const std::vector<int64_t>& values : cases) registered->Args(values);
}

int Main(int argc, char** argv, const std::function<void(Device&)>& register_all) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  auto device = Device::Open();
  if (!device.ok()) {
    std::fprintf(stderr, "%s\n", device.status().message().c_str());
    return 2;
  }
  benchmark::AddCustomContext("backend", device.value()->backend().name());
  benchmark::AddCustomContext("rehearsal", kRehearsal ? "yes: times mean nothing" : "no");
  benchmark::AddCustomContext("read_GB_per_s",
                              std::to_string(1e-9 * device.value()->read_bytes_per_second()));
  register_all(*device.value());
  benchmark::RunSpecifiedBenchmarks();
  benchmark::ClearRegisteredBenchmarks();  // with what they hold on the device
  benchmark::Shutdown();
  return failed ? 1 : 0;
}

}  // namespace loraserve::bench
