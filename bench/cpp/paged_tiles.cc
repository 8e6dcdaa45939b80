// LoRA products over tiles scattered in pages against the same panels in one contiguous piece.
//
// Decides the page size (docs/decisions): the loss must stay below 3 %. Arguments: rows, page KiB
// (0: contiguous). Each adapter set is larger than the last-level cache share of a core, as in
// decode, where every adapter is read once per step.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "backend/cpu/cpu_backend.h"

namespace loraserve {
namespace {

constexpr int64_t kIn = 2048;
constexpr int64_t kOut = 2048;
const int kRanks[] = {8, 16, 32, 64, 128, 8, 16, 128};
constexpr int kCopies = 6;  // of every adapter, used in turn

void MixedRank(benchmark::State& state) {
  const int64_t rows = state.range(0);
  std::vector<float> zeros(static_cast<size_t>(512 * std::max(kIn, kOut)), 0.01f);
  std::vector<AdapterSource> sources;
  uint64_t bytes = 0;
  for (int copy = 0; copy < kCopies; ++copy) {
    for (const int rank : kRanks) {
      sources.push_back(
          {{{.layer = 0,
             .module = LinearModule::kQ,
             .rank = rank,
             .scaling = 1.0f,
             .a = {.data = zeros.data(), .dtype = DType::kF32, .rows = rank, .cols = kIn},
             .b = {.data = zeros.data(), .dtype = DType::kF32, .rows = rank, .cols = kOut}}}});
      bytes += CpuAdapter::Bytes(sources.back(), DType::kBF16);
    }
  }
  CpuBackend backend({.threads = 1, .adapter_dtype = DType::kBF16, .isa = ""});
  // Contiguous: one page holds a whole adapter.
  const uint64_t page_bytes = state.range(1) == 0
                                  ? std::bit_ceil(CpuAdapter::Bytes(sources[4], DType::kBF16))
                                  : static_cast<uint64_t>(state.range(1)) << 10;
  KvLayout layout{.num_layers = 1,
                  .num_heads = 1,
                  .num_kv_heads = 1,
                  .head_dim = 16,
                  .block_size = 16,
                  .page_bytes = page_bytes,
                  .tile_bytes = 1024,
                  .tiles_per_page = 1,
                  .pages_per_block = 2};
  const std::vector<float> frequencies(8, 1.0f);
  uint32_t num_pages = 0;
  for (const AdapterSource& source : sources) {
    num_pages += static_cast<uint32_t>((CpuAdapter::Bytes(source, DType::kBF16) + page_bytes - 1) /
                                       page_bytes);
  }
  if (!backend.BindPages(layout, num_pages, frequencies).ok()) {
    state.SkipWithError("no memory");
    return;
  }
  std::vector<PageId> free(num_pages);
  std::iota(free.begin(), free.end(), 0);
  std::shuffle(free.begin(), free.end(), std::mt19937(3));
  std::vector<std::unique_ptr<InstalledAdapter>> adapters;
  for (const AdapterSource& source : sources) {
    const uint32_t count = backend.AdapterPages(source);
    const std::vector<PageId> pages(free.end() - count, free.end());
    free.resize(free.size() - count);
    adapters.push_back(std::move(backend.InstallAdapter(source, pages).value()));
  }
  const auto total_rows = static_cast<int64_t>(std::size(kRanks)) * rows;
  std::vector<float> x(static_cast<size_t>(total_rows * kIn), 0.5f);
  std::vector<float> y(static_cast<size_t>(total_rows * kOut), 0.0f);
  const Tensor in{x.data(), total_rows, kIn, kIn};
  const Tensor out{y.data(), total_rows, kOut, kOut};
  const LoraTarget target[] = {{0, LinearModule::kQ, 0}};
  size_t copy = 0;
  for (auto _ : state) {
    std::vector<LoraSegment> segments;
    for (size_t i = 0; i < std::size(kRanks); ++i) {
      segments.push_back({static_cast<int32_t>(i * static_cast<size_t>(rows)),
                          static_cast<int32_t>(rows),
                          adapters[copy * std::size(kRanks) + i].get()});
    }
    copy = (copy + 1) % kCopies;
    backend.BeginStep(nullptr, {.segments = segments});
    backend.Lora(nullptr, in, target, out);
    benchmark::ClobberMemory();
  }
  state.counters["GB/s"] = benchmark::Counter(
      static_cast<double>(bytes) / kCopies * static_cast<double>(state.iterations()) * 1e-9,
      benchmark::Counter::kIsRate);
}

BENCHMARK(MixedRank)
    ->ArgNames({"rows", "page_KiB"})
    ->ArgsProduct({{1, 4, 32}, {0, 4, 16, 64}})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace loraserve

BENCHMARK_MAIN();
