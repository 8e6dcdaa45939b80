// _testing: C++ parts that have no product binding, for the Python tests. Never shipped.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backend/cpu/adapter_tiles.h"
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/sampler.h"
#include "base/dtype.h"
#include "base/philox.h"
#include "bindings/raise.h"
#include "kv/prefix_cache.h"
#include "memory/page_arena.h"

namespace py = pybind11;
using namespace loraserve;

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

HostMatrix MatrixOf(const FloatArray& array) {
  return {
      .data = array.data(), .dtype = DType::kF32, .rows = array.shape(0), .cols = array.shape(1)};
}

// y [rows, N] = x W^T (+ bias) by the table of `isa`, whatever the padding.
FloatArray Gemm(const std::string& isa, const FloatArray& x, const FloatArray& w, bool bfloat16,
                int threads) {
  CpuBackend backend({.threads = threads, .adapter_dtype = std::nullopt, .isa = isa});
  const HostMatrix part = MatrixOf(w);
  const auto weight =
      Unwrap(backend.PrepareWeight({&part, 1}, {}, bfloat16 ? DType::kBF16 : DType::kF32));
  const int64_t stride = backend.RowStride(part.rows);
  const auto buffer = Unwrap(backend.Allocate(static_cast<uint64_t>(x.shape(0) * stride) * 4));
  const Tensor in{const_cast<float*>(x.data()), x.shape(0), x.shape(1), x.shape(1)};
  backend.Gemm(nullptr, in, *weight, false, {buffer->data(), x.shape(0), part.rows, stride});
  FloatArray y({x.shape(0), static_cast<py::ssize_t>(part.rows)});
  for (int64_t row = 0; row < x.shape(0); ++row) {
    std::copy_n(static_cast<float*>(buffer->data()) + row * stride, part.rows,
                y.mutable_data() + row * part.rows);
  }
  return y;
}

// y += scaling * (x A^T) B for each segment (row_begin, row_count, index of pair), through pages.
FloatArray Lora(const std::string& isa, const FloatArray& x, const FloatArray& y0,
                const std::vector<std::tuple<FloatArray, FloatArray, float>>& adapters,
                const std::vector<std::tuple<int, int, int>>& segments, bool bfloat16,
                uint64_t page_bytes, int threads) {
  CpuBackend backend(
      {.threads = threads, .adapter_dtype = bfloat16 ? DType::kBF16 : DType::kF32, .isa = isa});
  KvLayout layout{.num_layers = 1,
                  .num_heads = 1,
                  .num_kv_heads = 1,
                  .head_dim = 16,
                  .block_size = 16,
                  .page_bytes = page_bytes,
                  .tile_bytes = 1024,
                  .tiles_per_page = 1,
                  .pages_per_block = 2};
  std::vector<AdapterSource> sources;
  uint32_t pages = 0;
  for (const auto& [a, b, scaling] : adapters) {
    sources.push_back({{{.layer = 0,
                         .module = LinearModule::kQ,
                         .rank = static_cast<int>(a.shape(0)),
                         .scaling = scaling,
                         .a = MatrixOf(a),
                         .b = MatrixOf(b)}}});
    pages += static_cast<uint32_t>(
        CpuAdapter::Bytes(sources.back(), bfloat16 ? DType::kBF16 : DType::kF32) / page_bytes + 1);
  }
  const std::vector<float> frequencies(8, 1.0f);
  RaiseIfError(backend.BindPages(layout, pages, frequencies));
  std::vector<std::unique_ptr<InstalledAdapter>> installed;
  uint32_t next = pages;  // backwards, so that runs of pages are not contiguous in memory
  for (const AdapterSource& source : sources) {
    std::vector<PageId> own;
    for (uint32_t i = 0; i < backend.AdapterPages(source); ++i) own.push_back(--next);
    installed.push_back(Unwrap(backend.InstallAdapter(nullptr, source, own)));
  }
  std::vector<LoraSegment> lora;
  for (const auto& [begin, count, index] : segments) {
    lora.push_back({begin, count, installed[static_cast<size_t>(index)].get()});
  }
  FloatArray y({y0.shape(0), y0.shape(1)});
  std::copy_n(y0.data(), y0.size(), y.mutable_data());
  const LoraTarget target[] = {{0, LinearModule::kQ, 0}};
  std::vector<float> h(static_cast<size_t>(backend.LoraScratch(lora, target)));
  const Tensor in{const_cast<float*>(x.data()), x.shape(0), x.shape(1), x.shape(1)};
  const Tensor out{y.mutable_data(), y.shape(0), y.shape(1), y.shape(1)};
  backend.LoraShrink(nullptr, in, lora, target, h.data());
  backend.LoraExpand(nullptr, h.data(), lora, target, out);
  return y;
}

std::vector<int32_t> SampleMany(const FloatArray& logits, float temperature, int top_k, float top_p,
                                float min_p, uint64_t seed, int draws) {
  SamplerScratch scratch;
  std::vector<int32_t> tokens;
  SampleRow row;
  row.temperature = temperature;
  row.top_k = top_k;
  row.top_p = top_p;
  row.min_p = min_p;
  row.seed = seed;
  const std::span<const float> values(logits.data(), static_cast<size_t>(logits.size()));
  for (int i = 0; i < draws; ++i) {
    row.position = static_cast<uint64_t>(i);
    tokens.push_back(SampleToken(SelectKernels(nullptr), values, row, scratch).token);
  }
  return tokens;
}

int32_t SamplePenalized(const FloatArray& logits, const std::vector<int32_t>& prompt,
                        const std::vector<int32_t>& output, float repetition, float presence,
                        float frequency, const std::vector<std::pair<int32_t, float>>& bias,
                        const std::vector<int32_t>& banned, const std::vector<uint32_t>& mask) {
  SamplerScratch scratch;
  SampleRow row;
  row.temperature = 0;
  row.repetition_penalty = repetition;
  row.presence_penalty = presence;
  row.frequency_penalty = frequency;
  row.prompt = prompt;
  row.output = output;
  row.logit_bias = bias;
  row.banned = banned;
  row.mask = mask;
  const std::span<const float> values(logits.data(), static_cast<size_t>(logits.size()));
  return SampleToken(SelectKernels(nullptr), values, row, scratch).token;
}

}  // namespace

PYBIND11_MODULE(_testing, m) {
  RegisterStatusError(m);
  py::enum_<PageUse>(m, "PageUse")
      .value("FREE", PageUse::kFree)
      .value("KV", PageUse::kKv)
      .value("ADAPTER", PageUse::kAdapter);
  py::class_<PageArena>(m, "PageArena")
      .def(py::init([](uint64_t page_bytes, uint32_t num_pages) {
             return Unwrap(PageArena::Create(page_bytes, num_pages));
           }),
           py::arg("page_bytes"), py::arg("num_pages"))
      .def("allocate", [](PageArena& arena, uint32_t count,
                          PageUse use) { return Unwrap(arena.Allocate(count, use)); })
      .def("free", [](PageArena& arena,
                      const std::vector<PageId>& pages) { RaiseIfError(arena.Free(pages)); })
      .def("count", &PageArena::count)
      .def("offset", &PageArena::offset)
      .def_property_readonly("num_pages", &PageArena::num_pages);
  py::class_<BlockPool>(m, "BlockPool")
      .def(py::init<PageArena*, uint32_t>(), py::keep_alive<1, 2>())
      .def("allocate", &BlockPool::Allocate)
      .def("free", &BlockPool::Free);
  py::class_<PrefixCache>(m, "PrefixCache")
      .def(py::init<BlockPool*, int>(), py::keep_alive<1, 2>())
      .def_readonly_static("NONE", &PrefixCache::kNone)
      .def("root", &PrefixCache::Root)
      .def("find", [](const PrefixCache& cache, PrefixCache::NodeId parent,
                      const std::vector<int32_t>& tokens) { return cache.Find(parent, tokens); })
      .def("insert",
           [](PrefixCache& cache, PrefixCache::NodeId parent, const std::vector<int32_t>& tokens,
              BlockId block) { return cache.Insert(parent, tokens, block); })
      .def("block", &PrefixCache::block)
      .def("use", &PrefixCache::Use)
      .def("release", &PrefixCache::Release)
      .def("oldest_use", &PrefixCache::OldestUse)
      .def("evict", &PrefixCache::Evict)
      .def("evictable", &PrefixCache::evictable);
  m.def("gemm", &Gemm, py::arg("isa"), py::arg("x"), py::arg("w"), py::arg("bfloat16"),
        py::arg("threads"));
  m.def("lora", &Lora, py::arg("isa"), py::arg("x"), py::arg("y"), py::arg("adapters"),
        py::arg("segments"), py::arg("bfloat16"), py::arg("page_bytes"), py::arg("threads"));
  m.def("sample_many", &SampleMany, py::arg("logits"), py::arg("temperature"), py::arg("top_k"),
        py::arg("top_p"), py::arg("min_p"), py::arg("seed"), py::arg("draws"));
  m.def("sample_penalized", &SamplePenalized, py::arg("logits"), py::arg("prompt"),
        py::arg("output"), py::arg("repetition"), py::arg("presence"), py::arg("frequency"),
        py::arg("bias"), py::arg("banned"), py::arg("mask"));
  m.def("kernel_names", [] {
    std::vector<std::string> names;
    for (const char* limit : {"x86-64-v2", "x86-64-v3", "x86-64-v4"}) {
      const std::string name = SelectKernels(limit).name;
      if (names.empty() || names.back() != name) names.push_back(name);
    }
    return names;
  });
  m.def("philox", &Philox);
  m.def("f16_to_f32", &F16ToF32);
  m.def("f32_to_bf16", &F32ToBF16);
}
