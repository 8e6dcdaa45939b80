// Dense products against what the core can do at most, one thread, by instruction set.
//
// Weights are used in turn, so that they come from main memory as in a model step. "of_peak" is the
// share of an in-process multiply-add loop (many rows), "GB/s" the weight bytes read (few rows).
// Arguments: rows, outputs, inputs, 1 for bfloat16 weights.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "backend/cpu/kernels.h"
#include "backend/cpu/prepared_weight.h"
#include "base/machine_limits.h"

namespace loraserve {
namespace {

constexpr int64_t kWeightBytes = 160 << 20;  // in all: several times a last-level cache

void Gemm(benchmark::State& state, const CpuKernels& kernels) {
  const int64_t rows = state.range(0);
  const int64_t n = state.range(1);
  const int64_t k = state.range(2);
  const bool bfloat16 = state.range(3) != 0;
  const int64_t bytes = n * k * (bfloat16 ? 2 : 4);
  const int64_t copies = std::max<int64_t>(1, kWeightBytes / bytes);
  const auto weights = HostBuffer::Create(static_cast<uint64_t>(copies * bytes));
  if (bfloat16) {
    auto* const w = static_cast<uint16_t*>(weights->data());
    std::fill(w, w + copies * n * k, uint16_t{0x3c23});
  } else {
    auto* const w = static_cast<float*>(weights->data());
    std::fill(w, w + copies * n * k, 0.01f);
  }
  std::vector<float> x(static_cast<size_t>(rows * k), 0.5f);
  std::vector<float> y(static_cast<size_t>(rows * n), 0.0f);
  std::vector<float> scratch(static_cast<size_t>(GemmScratch(rows, k)));
  int64_t copy = 0;
  for (auto _ : state) {
    kernels.gemm(
        {.x = x.data(),
         .x_stride = k,
         .rows = rows,
         .k = k,
         .weight = static_cast<const std::byte*>(weights->HostBuffer::data()) + copy * bytes,
         .bfloat16 = bfloat16,
         .panel_begin = 0,
         .panel_end = n / kPanelWidth,
         .y = y.data(),
         .y_stride = n,
         .scratch = scratch.data()});
    benchmark::ClobberMemory();
    copy = (copy + 1) % copies;
  }
  const double calls = static_cast<double>(state.iterations());
  const double flops = 2.0 * static_cast<double>(rows * n * k);
  state.counters["GF/s"] = benchmark::Counter(flops * calls * 1e-9, benchmark::Counter::kIsRate);
  state.counters["GB/s"] =
      benchmark::Counter(static_cast<double>(bytes) * calls * 1e-9, benchmark::Counter::kIsRate);
}

void FmaPeak(benchmark::State& state, const CpuKernels& kernels) {
  constexpr int64_t kFlops = 100'000'000;
  for (auto _ : state) benchmark::DoNotOptimize(RunFmaLoop(kernels.name, kFlops));
  state.counters["GF/s"] = benchmark::Counter(
      static_cast<double>(kFlops) * static_cast<double>(state.iterations()) * 1e-9,
      benchmark::Counter::kIsRate);
}

void ReadPeak(benchmark::State& state) {
  std::vector<float> memory(kWeightBytes / sizeof(float), 1.0f);
  const auto count = static_cast<int64_t>(memory.size());
  for (auto _ : state) benchmark::DoNotOptimize(RunReadLoop(memory.data(), count));
  state.counters["GB/s"] = benchmark::Counter(
      static_cast<double>(count) * 4e-9 * static_cast<double>(state.iterations()),
      benchmark::Counter::kIsRate);
}

void RegisterAll() {
  benchmark::RegisterBenchmark("ReadPeak", ReadPeak);
  for (const char* isa : {"x86-64-v3", "x86-64-v4", "neon", "generic"}) {
    const CpuKernels& kernels = SelectKernels(isa);
    if (std::strcmp(kernels.name, isa) != 0) continue;
    const std::string suffix = std::string("/") + isa;
    if (std::strcmp(isa, "generic") != 0) {
      benchmark::RegisterBenchmark(("FmaPeak" + suffix).c_str(),
                                   [&kernels](benchmark::State& s) { FmaPeak(s, kernels); });
    }
    auto* const gemm = benchmark::RegisterBenchmark(
        ("Gemm" + suffix).c_str(), [&kernels](benchmark::State& s) { Gemm(s, kernels); });
    gemm->ArgNames({"rows", "n", "k", "bf16"})->Unit(benchmark::kMicrosecond);
    for (const int64_t bf16 : {1, 0}) {
      for (const int64_t rows : {1, 4, 8, 32, 64, 512}) {
        gemm->Args({rows, 5632, 2048, bf16});
      }
      for (const int64_t rows : {1, 8, 32, 512}) gemm->Args({rows, 768, 768, bf16});
    }
  }
}

}  // namespace
}  // namespace loraserve

int main(int argc, char** argv) {
  loraserve::RegisterAll();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
