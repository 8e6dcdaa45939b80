// How fast kernels are beside what the machine can do, for the tests that guard it. One thread
// unless said otherwise, and its own processor time: others on the machine take nothing away.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <time.h>

#include <algorithm>
#include <numeric>
#include <thread>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "base/clock.h"
#include "base/machine_limits.h"
#include "bindings/testing.h"

namespace py = pybind11;

namespace loraserve {
namespace {

constexpr size_t kReadFloats = 24 << 20;  // 96 MiB: more than a last-level cache

double ThreadSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

template <class Function>
double Timed(Function&& function) {
  const double begin = ThreadSeconds();
  function();
  return ThreadSeconds() - begin;
}

const std::vector<float>& ReadMemory() {
  static const std::vector<float> memory(kReadFloats, 1.0f);
  return memory;
}

volatile float sink;

// One time of the limit and one of the kernel after each other, `repeats` times; the best of each.
struct Rates {
  double kernel = 0;
  double limit = 0;
};

template <class Kernel, class Limit>
Rates Best(int repeats, double kernel_work, Kernel&& kernel, double limit_work, Limit&& limit) {
  Rates best;
  for (int i = 0; i < repeats; ++i) {
    best.limit = std::max(best.limit, limit_work / Timed(limit));
    best.kernel = std::max(best.kernel, kernel_work / Timed(kernel));
  }
  return best;
}

// (kernel, limit): GFLOP/s beside a multiply-add loop, or, with rows == 1, GB/s beside a read loop.
std::pair<double, double> GemmRates(const std::string& isa, int64_t rows, int64_t n, int64_t k,
                                    bool bfloat16, int repeats) {
  const CpuKernels& kernels = SelectKernels(isa.c_str());
  const auto bytes = static_cast<uint64_t>(n * KeptRows(k, bfloat16) * (bfloat16 ? 2 : 4));
  const auto weight = HostBuffer::Create(bytes);
  std::fill_n(static_cast<std::byte*>(weight->data()), bytes, std::byte{0x3c});
  std::vector<float> x(static_cast<size_t>(rows * k), 0.5f);
  std::vector<float> y(static_cast<size_t>(rows * n));
  std::vector<float> scratch(static_cast<size_t>(GemmScratch(rows, k)));
  const auto kernel = [&] {
    kernels.gemm({.x = x.data(),
                  .x_stride = k,
                  .rows = rows,
                  .k = k,
                  .weight = weight->HostBuffer::data(),
                  .bfloat16 = bfloat16,
                  .panel_end = n / kPanelWidth,
                  .y = y.data(),
                  .y_stride = n,
                  .scratch = scratch.data()});
  };
  if (rows == 1) {
    const auto read = [] { sink = RunReadLoop(ReadMemory().data(), kReadFloats); };
    const Rates rates = Best(repeats, static_cast<double>(bytes), kernel, kReadFloats * 4.0, read);
    return {rates.kernel * 1e-9, rates.limit * 1e-9};
  }
  constexpr int64_t kFlops = 100'000'000;
  const auto fma = [&] { sink = RunFmaLoop(kernels.name, kFlops); };
  const Rates rates = Best(repeats, 2.0 * static_cast<double>(rows * n * k), kernel,
                           static_cast<double>(kFlops), fma);
  return {rates.kernel * 1e-9, rates.limit * 1e-9};
}

// (kernel, limit) in GB/s: shrink and expand of eight adapters of mixed ranks, one row each.
std::pair<double, double> LoraRates(const std::string& isa, int64_t width, int repeats) {
  constexpr int kRanks[] = {8, 16, 32, 64, 128, 8, 16, 128};
  constexpr int kLayers = 24;  // read in turn: together more than a last-level cache
  constexpr uint64_t kPageBytes = 64 << 10;
  CpuBackend backend({.threads = 1, .adapter_dtype = DType::kBF16, .isa = isa});
  const std::vector<float> values(static_cast<size_t>(128 * width), 0.01f);
  std::vector<AdapterSource> sources;
  KvLayout layout{.num_layers = 1,
                  .num_heads = 1,
                  .num_kv_heads = 1,
                  .head_dim = 16,
                  .block_size = 16,
                  .page_bytes = kPageBytes,
                  .tile_bytes = 1024,
                  .tiles_per_page = 1,
                  .pages_per_block = 2};
  double bytes = 0;
  for (const int rank : kRanks) {
    AdapterSource source;
    for (int layer = 0; layer < kLayers; ++layer) {
      const HostMatrix matrix{
          .data = values.data(), .dtype = DType::kF32, .rows = rank, .cols = width};
      source.modules.push_back({.layer = layer,
                                .module = LinearModule::kQ,
                                .rank = rank,
                                .scaling = 1.0f,
                                .a = matrix,
                                .b = matrix});
      bytes += 2.0 * 2.0 * rank * static_cast<double>(width);
    }
    sources.push_back(std::move(source));
  }
  const std::vector<float> frequencies(8, 1.0f);
  // Once for the page size, which AdapterPages asks for, and again for their number.
  if (!backend.BindPages(layout, 1, frequencies).ok()) return {0, 1};
  uint32_t pages = 0;
  for (const AdapterSource& source : sources) pages += backend.AdapterPages(source);
  if (!backend.BindPages(layout, pages, frequencies).ok()) return {0, 1};
  std::vector<std::unique_ptr<InstalledAdapter>> adapters;
  std::vector<LoraSegment> segments;
  for (const AdapterSource& source : sources) {
    std::vector<PageId> own(backend.AdapterPages(source));
    std::iota(own.rbegin(), own.rend(), pages - static_cast<uint32_t>(own.size()));
    pages -= static_cast<uint32_t>(own.size());
    adapters.push_back(std::move(backend.InstallAdapter(source, own).value()));
    segments.push_back({static_cast<int32_t>(segments.size()), 1, adapters.back().get()});
  }
  std::vector<float> x(static_cast<size_t>(8 * width), 0.5f);
  std::vector<float> y(static_cast<size_t>(8 * width));
  backend.BeginStep(nullptr, {.segments = segments});
  const auto kernel = [&] {
    for (int layer = 0; layer < kLayers; ++layer) {
      const LoraTarget target[] = {{layer, LinearModule::kQ, 0}};
      backend.Lora(nullptr, {x.data(), 8, width, width}, target, {y.data(), 8, width, width});
    }
  };
  const auto read = [] { sink = RunReadLoop(ReadMemory().data(), kReadFloats); };
  const Rates rates = Best(repeats, bytes, kernel, kReadFloats * 4.0, read);
  return {rates.kernel * 1e-9, rates.limit * 1e-9};
}

// (kernel, limit): GFLOP/s beside a multiply-add loop, or, with one query, GB/s beside a read loop.
// Every query sees the whole context.
std::pair<double, double> AttentionRates(const std::string& isa, int32_t context, int queries,
                                         int head_dim, int repeats) {
  const CpuKernels& kernels = SelectKernels(isa.c_str());
  const int32_t panels = context / 16;
  const auto floats = static_cast<int64_t>(context) * head_dim;
  const auto cache = HostBuffer::Create(static_cast<uint64_t>(floats) * 2 * sizeof(float));
  auto* const keys = static_cast<float*>(cache->data());
  std::fill_n(keys, 2 * floats, 0.5f);
  std::vector<const float*> key_panels, value_panels;
  for (int32_t panel = 0; panel < panels + kPanelsAhead; ++panel) {
    const int64_t at = int64_t{panel % panels} * 16 * head_dim;
    key_panels.push_back(keys + at);
    value_panels.push_back(keys + floats + at);
  }
  std::vector<float> row(static_cast<size_t>(head_dim), 0.1f);
  std::vector<float> out(static_cast<size_t>(head_dim));
  const std::vector<const float*> rows(static_cast<size_t>(queries), row.data());
  const std::vector<float*> outputs(static_cast<size_t>(queries), out.data());
  const std::vector<int32_t> first(static_cast<size_t>(queries), 0);
  const std::vector<int32_t> last(static_cast<size_t>(queries), context - 1);
  std::vector<float> scratch(static_cast<size_t>(AttentionScratch(head_dim)));
  const auto kernel = [&] {
    kernels.attention({.queries = rows.data(),
                       .first = first.data(),
                       .last = last.data(),
                       .outputs = outputs.data(),
                       .count = queries,
                       .head_dim = head_dim,
                       .padded_head_dim = head_dim,
                       .key_panels = key_panels.data(),
                       .value_panels = value_panels.data(),
                       .value_stride = 16 * 16,
                       .scratch = scratch.data()});
  };
  if (queries == 1) {
    const auto read = [] { sink = RunReadLoop(ReadMemory().data(), kReadFloats); };
    const Rates rates =
        Best(repeats, 8.0 * static_cast<double>(floats), kernel, kReadFloats * 4.0, read);
    return {rates.kernel * 1e-9, rates.limit * 1e-9};
  }
  constexpr int64_t kFlops = 100'000'000;
  const auto fma = [&] { sink = RunFmaLoop(kernels.name, kFlops); };
  const Rates rates = Best(repeats, 4.0 * queries * static_cast<double>(floats), kernel,
                           static_cast<double>(kFlops), fma);
  return {rates.kernel * 1e-9, rates.limit * 1e-9};
}

// What `threads` threads read from memory together, GB/s by the wall clock: the best of some.
double ReadRate(int threads) {
  double best = 0;
  const std::vector<float>& memory = ReadMemory();
  const int64_t share = static_cast<int64_t>(kReadFloats) / threads;
  for (int repeat = 0; repeat < 15; ++repeat) {
    const double begin = MonotonicSeconds();
    std::vector<std::thread> readers;
    for (int t = 0; t < threads; ++t) {
      readers.emplace_back([&, t] {
        for (int pass = 0; pass < 4; ++pass) sink = RunReadLoop(memory.data() + t * share, share);
      });
    }
    for (std::thread& reader : readers) reader.join();
    best = std::max(best, 4 * kReadFloats * 4e-9 / (MonotonicSeconds() - begin));
  }
  return best;
}

}  // namespace

void BindSpeed(py::module_& m) {
  m.def("gemm_rates", &GemmRates, py::arg("isa"), py::arg("rows"), py::arg("n"), py::arg("k"),
        py::arg("bfloat16"), py::arg("repeats"));
  m.def("attention_rates", &AttentionRates, py::arg("isa"), py::arg("context"), py::arg("queries"),
        py::arg("head_dim"), py::arg("repeats"));
  m.def("lora_rates", &LoraRates, py::arg("isa"), py::arg("width"), py::arg("repeats"));
  m.def("read_gbytes_per_s", &ReadRate, py::arg("threads"));
}

}  // namespace loraserve
