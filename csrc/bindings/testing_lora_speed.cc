// How long a step's LoRA takes and nothing else, on any backend: bench/gpu_lora.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <vector>

#include "backend/registry.h"
#include "base/clock.h"
#include "bindings/raise.h"
#include "bindings/testing.h"

namespace py = pybind11;

namespace loraserve {
namespace {

constexpr int64_t kFlushColumns = 4096;

// Modules that share their input, as the model calls Lora.
constexpr std::array<std::pair<int, int>, 4> kGroups = {{{0, 3}, {3, 4}, {4, 6}, {6, 7}}};

// Adapters of all seven modules of so many layers, all with the same numbers in places of their
// own: what they hold does not matter, where it lies does.
class LoraSpeed {
 public:
  // `shapes`: (in, out) of the seven modules. `ranks`: of each adapter.
  LoraSpeed(const std::string& device, int layers,
            const std::vector<std::pair<int64_t, int64_t>>& shapes, const std::vector<int>& ranks,
            int64_t max_rows, uint64_t page_bytes, uint64_t flush_bytes, const std::string& isa)
      : backend_(
            Unwrap(CreateBackend({.device = device, .adapter_dtype = DType::kBF16, .isa = isa}))),
        layers_(layers),
        shapes_(shapes),
        max_rows_(max_rows) {
    if (shapes.size() != kNumLinearModules || ranks.empty() || layers < 1 || max_rows < 1) {
      throw py::value_error("shapes: of seven modules; at least one rank, layer and row");
    }
    Install(ranks, page_bytes);
    for (const auto& [begin, end] : kGroups) {
      int64_t columns = 0;
      for (int m = begin; m < end; ++m) columns += shapes_[static_cast<size_t>(m)].second;
      inputs_.push_back(Zeros(max_rows, shapes_[static_cast<size_t>(begin)].first));
      outputs_.push_back(Zeros(max_rows, columns));
    }
    const auto element = static_cast<uint64_t>(ElementBytes());
    const auto flushed = static_cast<int64_t>(flush_bytes / element) / kFlushColumns;
    if (flushed > 0) flush_ = Zeros(flushed, kFlushColumns);
  }

  std::string name() const { return backend_->name(); }

  // Of each adapter's weights, all layers.
  std::vector<uint64_t> WeightBytes() const {
    std::vector<uint64_t> bytes;
    for (const auto& adapter : adapters_) bytes.push_back(adapter->weight_bytes());
    return bytes;
  }

  // Seconds of each of `repeats` steps: LoRA of all layers over one row for each sequence, from the
  // launch until the host has seen it end. `segments`: (row_begin, row_count, adapter). The plan of
  // a step is made before, untimed; what caches held is overwritten before it, if so made.
  std::vector<double> Run(int64_t rows, const std::vector<std::tuple<int, int, size_t>>& segments,
                          int repeats) {
    if (rows < 1 || rows > max_rows_) throw py::value_error("rows: from 1 to max_rows");
    std::vector<LoraSegment> planned;
    for (const auto& [begin, count, adapter] : segments) {
      planned.push_back({begin, count, adapters_.at(adapter).get()});
    }
    std::vector<int32_t> zeros(static_cast<size_t>(rows));
    std::vector<SequenceSpan> sequences;
    for (int32_t row = 0; row < rows; ++row) sequences.push_back({row, 1, 1, 0});
    const StepInputs inputs = {
        .token_ids = zeros, .positions = zeros, .sequences = sequences, .segments = planned};
    const py::gil_scoped_release release;
    std::vector<double> seconds;
    for (int i = 0; i < repeats; ++i) {
      if (flush_.buffer != nullptr) {
        const Tensor half = {flush_.tensor.data, flush_.tensor.rows, kFlushColumns / 2,
                             kFlushColumns};
        backend_->SiluMul(nullptr, flush_.tensor, half);
      }
      backend_->BeginStep(nullptr, inputs);
      backend_->Synchronize(nullptr);
      const double begin = MonotonicSeconds();
      backend_->RunStep(nullptr, rows, max_rows_, [&](int64_t n) { QueueLayers(n); });
      backend_->Synchronize(nullptr);
      seconds.push_back(MonotonicSeconds() - begin);
    }
    return seconds;
  }

 private:
  struct Memory {
    std::unique_ptr<Buffer> buffer;
    Tensor tensor;
  };

  int64_t ElementBytes() const { return backend_->activation_dtype() == DType::kF32 ? 4 : 2; }

  Memory Zeros(int64_t rows, int64_t columns) {
    const int64_t stride = backend_->RowStride(columns);
    const std::vector<std::byte> host(static_cast<size_t>(rows * stride * ElementBytes()));
    Memory memory{.buffer = Unwrap(backend_->Allocate(host.size()))};
    backend_->CopyToDevice(nullptr, host.data(), memory.buffer->data(), host.size());
    backend_->Synchronize(nullptr);
    memory.tensor = {memory.buffer->data(), rows, columns, stride};
    return memory;
  }

  void QueueLayers(int64_t rows) {
    std::vector<LoraTarget> targets;
    for (int layer = 0; layer < layers_; ++layer) {
      for (size_t group = 0; group < kGroups.size(); ++group) {
        targets.clear();
        int64_t column = 0;
        for (int m = kGroups[group].first; m < kGroups[group].second; ++m) {
          targets.push_back({layer, static_cast<LinearModule>(m), column});
          column += shapes_[static_cast<size_t>(m)].second;
        }
        Tensor x = inputs_[group].tensor;
        Tensor y = outputs_[group].tensor;
        x.rows = y.rows = rows;
        backend_->Lora(nullptr, x, targets, y);
      }
    }
  }

  void Install(const std::vector<int>& ranks, uint64_t page_bytes) {
    int64_t widest = 0;
    for (const auto& [in, out] : shapes_) widest = std::max({widest, in, out});
    const int largest = *std::max_element(ranks.begin(), ranks.end());
    const std::vector<uint16_t> weights(static_cast<size_t>(largest * widest), 0x3c23);  // 0.01
    std::vector<AdapterSource> sources;
    for (const int rank : ranks) {
      AdapterSource& source = sources.emplace_back();
      for (int layer = 0; layer < layers_; ++layer) {
        for (int m = 0; m < kNumLinearModules; ++m) {
          const auto& [in, out] = shapes_[static_cast<size_t>(m)];
          source.modules.push_back({.layer = layer,
                                    .module = static_cast<LinearModule>(m),
                                    .rank = rank,
                                    .scaling = 1.0f,
                                    .a = {weights.data(), DType::kBF16, rank, in},
                                    .b = {weights.data(), DType::kBF16, rank, out}});
        }
      }
    }
    KvLayout layout{.num_layers = 1,
                    .num_heads = 1,
                    .num_kv_heads = 1,
                    .head_dim = 16,
                    .block_size = 16,
                    .page_bytes = page_bytes,
                    .tiles_per_page = 1,
                    .pages_per_block = 2};
    layout.tile_bytes = std::min(page_bytes, backend_->KvTileBytes(layout));
    const std::vector<float> frequencies(8, 1.0f);
    // Once for the page size, which AdapterPages asks for, and again for their number.
    RaiseIfError(backend_->BindPages(layout, 2, frequencies));
    uint32_t next = 0;
    for (const AdapterSource& source : sources) next += backend_->AdapterPages(source);
    RaiseIfError(backend_->BindPages(layout, next, frequencies));
    for (const AdapterSource& source : sources) {
      std::vector<PageId> own(backend_->AdapterPages(source));
      next -= static_cast<uint32_t>(own.size());
      std::iota(own.rbegin(), own.rend(), next);  // backwards: not contiguous in memory
      adapters_.push_back(Unwrap(backend_->InstallAdapter(source, own)));
    }
  }

  std::unique_ptr<Backend> backend_;  // outlives all below
  int layers_;
  std::vector<std::pair<int64_t, int64_t>> shapes_;
  int64_t max_rows_;
  std::vector<std::unique_ptr<InstalledAdapter>> adapters_;
  std::vector<Memory> inputs_, outputs_;  // of each group
  Memory flush_;
};

}  // namespace

void BindLoraSpeed(py::module_& m) {
  py::class_<LoraSpeed>(m, "LoraSpeed")
      .def(py::init<const std::string&, int, const std::vector<std::pair<int64_t, int64_t>>&,
                    const std::vector<int>&, int64_t, uint64_t, uint64_t, const std::string&>(),
           py::arg("device"), py::arg("layers"), py::arg("shapes"), py::arg("ranks"),
           py::arg("max_rows"), py::arg("page_bytes"), py::arg("flush_bytes") = 0,
           py::arg("isa") = "")
      .def_property_readonly("name", &LoraSpeed::name)
      .def("weight_bytes", &LoraSpeed::WeightBytes)
      .def("run", &LoraSpeed::Run, py::arg("rows"), py::arg("segments"), py::arg("repeats"));
}

}  // namespace loraserve
