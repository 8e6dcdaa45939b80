// Every operation of a Backend on NumPy arrays, through the interface alone, so that one suite of
// tests runs on each backend.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "backend/registry.h"
#include "base/check.h"
#include "bindings/device_array.h"
#include "bindings/host_array.h"
#include "bindings/raise.h"
#include "bindings/testing.h"

namespace py = pybind11;

namespace loraserve {
namespace {

// layer, module, A, B transposed, scaling
using ModuleTuple = std::tuple<int, int, py::array, py::array, float>;

AdapterSource SourceOf(const std::vector<ModuleTuple>& modules) {
  AdapterSource source;
  for (const auto& [layer, module, a, b, scaling] : modules) {
    source.modules.push_back({.layer = layer,
                              .module = static_cast<LinearModule>(module),
                              .rank = static_cast<int>(a.shape(0)),
                              .scaling = scaling,
                              .a = ViewOf(a),
                              .b = ViewOf(b)});
  }
  return source;
}

// A SampleRow that owns what it points to.
struct OwnedSampleRow : SampleRow {
  std::vector<int32_t> prompt_ids, output_ids, banned_ids;
  std::vector<std::pair<int32_t, float>> bias;
  std::vector<uint32_t> mask_words;
};

struct KvShape {
  int num_layers, num_heads, num_kv_heads, head_dim, block_size;
  uint64_t page_bytes;
};

// float16 too, which options of the engine never are: backends refuse it themselves.
DType AnyDType(const std::string& name) {
  return name == "float16" ? DType::kF16 : ParseDType(name);
}

class BackendOps {
 public:
  BackendOps(const std::string& device, const std::string& isa, int threads,
             const std::optional<std::string>& adapter_dtype,
             const std::optional<std::string>& activation_dtype)
      : backend_(Unwrap(CreateBackend(
            {.device = device,
             .threads = threads,
             .adapter_dtype =
                 adapter_dtype ? std::optional(AnyDType(*adapter_dtype)) : std::nullopt,
             .activation_dtype =
                 activation_dtype ? std::optional(AnyDType(*activation_dtype)) : std::nullopt,
             .isa = isa}))),
        arrays_(backend_.get()) {}

  std::string name() const { return backend_->name(); }

  // Writable memory, kept for as long as this.
  bool RegisterHostMemory(const py::buffer& buffer) {
    auto memory = std::make_unique<py::buffer_info>(buffer.request(/*writable=*/true));
    const bool registered = Unwrap(backend_->RegisterHostMemory(
        memory->ptr, static_cast<uint64_t>(memory->size * memory->itemsize)));
    if (registered) registered_.push_back(std::move(memory));
    return registered;
  }
  void UnregisterHostMemory() {
    for (const auto& memory : registered_) backend_->UnregisterHostMemory(memory->ptr);
    registered_.clear();
  }
  // (direct, staged) bytes.
  std::pair<uint64_t, uint64_t> InstallReads() const {
    const auto reads = backend_->install_reads();
    return {reads.direct_bytes, reads.staged_bytes};
  }

  // y = x W^T + bias for the parts stacked, or y0 + x W^T.
  FloatArray Gemm(const FloatArray& x, const std::vector<py::array>& parts,
                  const std::vector<float>& bias, const std::string& dtype,
                  const std::optional<FloatArray>& y0) {
    const auto weight = Prepare(parts, bias, dtype);
    const int64_t columns = weight->out_features();
    const Activation in = arrays_.Upload(x);
    const Activation out = y0 ? arrays_.Upload(*y0) : arrays_.Empty(x.shape(0), columns);
    backend_->Gemm(nullptr, in.tensor, *weight, y0.has_value(), out.tensor);
    return arrays_.Download(out);
  }

  FloatArray Embed(const py::array& table, const std::string& dtype,
                   const std::vector<int32_t>& ids) {
    const auto weight = Prepare({table}, {}, dtype);
    const Activation out = arrays_.Empty(static_cast<int64_t>(ids.size()), weight->in_features());
    backend_->BeginStep(nullptr, {.token_ids = ids});
    backend_->Embed(nullptr, *weight, out.tensor);
    return arrays_.Download(out);
  }

  FloatArray RmsNorm(const FloatArray& x, const std::vector<float>& weight, int64_t group,
                     float eps, bool in_place) {
    const auto vector = Unwrap(backend_->PrepareVector(weight));
    const Activation in = arrays_.Upload(x);
    const Activation out = in_place ? in : arrays_.Empty(x.shape(0), x.shape(1));
    backend_->RmsNorm(nullptr, in.tensor, *vector, group, eps, out.tensor);
    return arrays_.Download(out);
  }

  FloatArray SiluMul(const FloatArray& gate_up) {
    const Activation in = arrays_.Upload(gate_up);
    const Activation out = arrays_.Empty(gate_up.shape(0), gate_up.shape(1) / 2);
    backend_->SiluMul(nullptr, in.tensor, out.tensor);
    return arrays_.Download(out);
  }

  FloatArray GatherRows(const FloatArray& x, const std::vector<int32_t>& rows) {
    const Activation in = arrays_.Upload(x);
    const Activation out = arrays_.Empty(static_cast<int64_t>(rows.size()), x.shape(1));
    backend_->GatherRows(nullptr, in.tensor, rows, out.tensor);
    return arrays_.Download(out);
  }

  // Causal attention over rotated q and k. `qkv`: for each sequence [layers, tokens, q | k | v];
  // each step takes (sequence, count) next tokens of some. [layers, tokens, heads * head_dim] each.
  std::vector<FloatArray> Attention(const KvShape& shape,
                                    const std::vector<float>& inverse_frequencies, int window,
                                    const std::vector<FloatArray>& qkv,
                                    const std::vector<std::vector<std::pair<int, int>>>& steps) {
    std::vector<int> blocks;
    for (const FloatArray& one : qkv) {
      blocks.push_back(static_cast<int>(one.shape(1) + shape.block_size - 1) / shape.block_size);
    }
    const KvLayout layout = Bind(shape, blocks, inverse_frequencies);
    FillWithNan(layout);
    std::vector<FloatArray> out;
    for (const FloatArray& one : qkv) {
      out.emplace_back(std::vector<py::ssize_t>{one.shape(0), one.shape(1),
                                                py::ssize_t{shape.num_heads} * shape.head_dim});
    }
    std::vector<int> done(qkv.size());
    for (const auto& step : steps) RunStep(layout, window, qkv, step, done, out);
    return out;
  }

  // y0 += scaling * (x A^T) B for each segment (row_begin, row_count, adapter or -1) and target
  // (layer, module, column).
  FloatArray Lora(const FloatArray& x, const FloatArray& y0,
                  const std::vector<std::vector<ModuleTuple>>& adapters,
                  const std::vector<std::tuple<int, int, int>>& segments,
                  const std::vector<std::tuple<int, int, int64_t>>& targets, uint64_t page_bytes) {
    std::vector<AdapterSource> sources;
    for (const auto& modules : adapters) sources.push_back(SourceOf(modules));
    const auto installed = Install(sources, page_bytes);
    std::vector<LoraSegment> rows;
    for (const auto& [begin, count, adapter] : segments) {
      rows.push_back(
          {begin, count, adapter < 0 ? nullptr : installed[static_cast<size_t>(adapter)].get()});
    }
    std::vector<LoraTarget> wanted;
    for (const auto& [layer, module, column] : targets) {
      wanted.push_back({layer, static_cast<LinearModule>(module), column});
    }
    const Activation in = arrays_.Upload(x);
    const Activation out = arrays_.Upload(y0);
    backend_->BeginStep(nullptr, {.segments = rows});
    backend_->Lora(nullptr, in.tensor, wanted, out.tensor);
    return arrays_.Download(out);
  }

  // (bytes of the pages that the adapter takes, bytes of its weights in them).
  std::pair<uint64_t, uint64_t> AdapterBytes(const std::vector<ModuleTuple>& modules,
                                             uint64_t page_bytes) {
    const std::vector<AdapterSource> source = {SourceOf(modules)};
    const auto installed = Install(source, page_bytes);
    return {backend_->AdapterPages(source[0]) * page_bytes, installed[0]->weight_bytes()};
  }

  // (token, logprob, top logprobs) of each row.
  std::vector<std::tuple<int32_t, float, std::vector<std::pair<int32_t, float>>>> Sample(
      const FloatArray& logits, const std::vector<OwnedSampleRow>& owned) {
    std::vector<SampleRow> rows;
    for (const OwnedSampleRow& from : owned) {
      SampleRow& row = rows.emplace_back(from);
      row.prompt = from.prompt_ids;
      row.output = from.output_ids;
      row.banned = from.banned_ids;
      row.logit_bias = from.bias;
      row.mask = from.mask_words;
    }
    const Activation in = arrays_.Upload(logits);
    std::vector<SampleResult> results(rows.size());
    backend_->Sample(nullptr, in.tensor, rows, results);
    std::vector<std::tuple<int32_t, float, std::vector<std::pair<int32_t, float>>>> out;
    for (SampleResult& r : results) {
      out.emplace_back(r.token, r.logprob, std::move(r.top_logprobs));
    }
    return out;
  }

 private:
  std::unique_ptr<PreparedWeight> Prepare(const std::vector<py::array>& parts,
                                          const std::vector<float>& bias,
                                          const std::string& dtype) {
    std::vector<HostMatrix> matrices;
    for (const py::array& part : parts) matrices.push_back(ViewOf(part));
    return Unwrap(backend_->PrepareWeight(matrices, bias, ParseDType(dtype)));
  }

  // Binds an arena and deals its pages to the sequences in turn, so that no run is contiguous.
  KvLayout Bind(const KvShape& shape, const std::vector<int>& blocks,
                const std::vector<float>& inverse_frequencies) {
    KvLayout layout{.num_layers = shape.num_layers,
                    .num_heads = shape.num_heads,
                    .num_kv_heads = shape.num_kv_heads,
                    .head_dim = shape.head_dim,
                    .block_size = shape.block_size,
                    .page_bytes = shape.page_bytes};
    layout.tile_bytes = backend_->KvTileBytes(layout);
    layout.tiles_per_page = static_cast<int>(layout.page_bytes / layout.tile_bytes);
    LS_CHECK(layout.tiles_per_page > 0);
    const int tiles = 2 * shape.num_layers;
    layout.pages_per_block = (tiles + layout.tiles_per_page - 1) / layout.tiles_per_page;
    pages_.assign(blocks.size(), {});
    PageId next = 0;
    for (bool dealt = true; dealt;) {
      dealt = false;
      for (size_t s = 0; s < blocks.size(); ++s) {
        const auto wanted = static_cast<size_t>(blocks[s] * layout.pages_per_block);
        if (pages_[s].size() == wanted) continue;
        pages_[s].push_back(next++);
        dealt = true;
      }
    }
    RaiseIfError(backend_->BindPages(layout, next, inverse_frequencies));
    return layout;
  }

  // Stores NaN keys and values everywhere, as a former use may have left them.
  void FillWithNan(const KvLayout& layout) {
    for (const std::vector<PageId>& pages : pages_) {
      const auto tokens =
          static_cast<int32_t>(pages.size()) / layout.pages_per_block * layout.block_size;
      const std::vector<int32_t> positions(static_cast<size_t>(tokens));
      const SequenceSpan span{.row_begin = 0, .row_count = tokens, .context_length = tokens};
      const Activation in = arrays_.Empty(
          tokens, int64_t{layout.num_heads + 2 * layout.num_kv_heads} * layout.head_dim);
      backend_->BeginStep(nullptr, {.token_ids = positions,
                                    .positions = positions,
                                    .sequences = {&span, 1},
                                    .block_pages = pages});
      for (int layer = 0; layer < layout.num_layers; ++layer) {
        backend_->RopeAndStoreKv(nullptr, layer, in.tensor);
      }
      backend_->Synchronize(nullptr);
    }
  }

  void RunStep(const KvLayout& layout, int window, const std::vector<FloatArray>& qkv,
               const std::vector<std::pair<int, int>>& step, std::vector<int>& done,
               std::vector<FloatArray>& out) {
    std::vector<int32_t> positions;
    std::vector<SequenceSpan> spans;
    std::vector<PageId> pages;
    for (const auto& [index, count] : step) {
      const auto s = static_cast<size_t>(index);
      spans.push_back({.row_begin = static_cast<int32_t>(positions.size()),
                       .row_count = count,
                       .context_length = done[s] + count,
                       .page_begin = static_cast<int32_t>(pages.size())});
      for (int i = 0; i < count; ++i) positions.push_back(done[s] + i);
      pages.insert(pages.end(), pages_[s].begin(), pages_[s].end());
    }
    backend_->BeginStep(
        nullptr,
        {.token_ids = positions, .positions = positions, .sequences = spans, .block_pages = pages});
    const auto rows = static_cast<int64_t>(positions.size());
    for (int layer = 0; layer < layout.num_layers; ++layer) {
      FloatArray in({rows, static_cast<int64_t>(qkv[0].shape(2))});
      const auto each = [&](auto&& function) {  // (sequence, token, row)
        int64_t row = 0;
        for (const auto& [index, count] : step) {
          for (int i = 0; i < count; ++i) {
            const auto s = static_cast<size_t>(index);
            function(s, done[s] + i, row++);
          }
        }
      };
      each([&](size_t s, int token, int64_t row) {
        std::copy_n(qkv[s].data(layer, token, 0), in.shape(1), in.mutable_data(row, 0));
      });
      const Activation x = arrays_.Upload(in);
      const Activation y = arrays_.Empty(rows, int64_t{layout.num_heads} * layout.head_dim);
      backend_->RopeAndStoreKv(nullptr, layer, x.tensor);
      backend_->PagedAttention(nullptr, layer, x.tensor, window, y.tensor);
      const FloatArray result = arrays_.Download(y);
      each([&](size_t s, int token, int64_t row) {
        std::copy_n(result.data(row, 0), result.shape(1), out[s].mutable_data(layer, token, 0));
      });
    }
    for (const auto& [index, count] : step) done[static_cast<size_t>(index)] += count;
  }

  std::vector<std::unique_ptr<InstalledAdapter>> Install(const std::vector<AdapterSource>& sources,
                                                         uint64_t page_bytes) {
    // The pages of adapters are those of a cache; how its blocks look does not matter here.
    KvLayout layout{.num_layers = 1,
                    .num_heads = 1,
                    .num_kv_heads = 1,
                    .head_dim = 16,
                    .block_size = 16,
                    .page_bytes = page_bytes};
    layout.tile_bytes = std::min(page_bytes, backend_->KvTileBytes(layout));
    layout.tiles_per_page = 1;
    layout.pages_per_block = 2;
    // Once for the page size, which AdapterPages asks for, and again for their number.
    RaiseIfError(backend_->BindPages(layout, 2, std::vector<float>(8, 1.0f)));
    uint32_t next = 0;
    for (const AdapterSource& source : sources) next += backend_->AdapterPages(source);
    RaiseIfError(backend_->BindPages(layout, next, std::vector<float>(8, 1.0f)));
    std::vector<std::unique_ptr<InstalledAdapter>> installed;
    for (const AdapterSource& source : sources) {
      std::vector<PageId> own;  // backwards: not contiguous in memory
      for (uint32_t i = 0; i < backend_->AdapterPages(source); ++i) own.push_back(--next);
      installed.push_back(Unwrap(backend_->InstallAdapter(source, own)));
    }
    return installed;
  }

  std::vector<std::unique_ptr<py::buffer_info>> registered_;
  std::unique_ptr<Backend> backend_;
  DeviceArrays arrays_;
  std::vector<std::vector<PageId>> pages_;  // of each sequence
};

}  // namespace

void BindBackendOps(py::module_& m) {
  py::class_<KvShape>(m, "KvShape")
      .def(py::init<int, int, int, int, int, uint64_t>(), py::arg("num_layers"),
           py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
           py::arg("block_size"), py::arg("page_bytes"));
  py::class_<OwnedSampleRow>(m, "SampleRow")
      .def(py::init<>())
      .def_readwrite("temperature", &OwnedSampleRow::temperature)
      .def_readwrite("top_k", &OwnedSampleRow::top_k)
      .def_readwrite("top_p", &OwnedSampleRow::top_p)
      .def_readwrite("min_p", &OwnedSampleRow::min_p)
      .def_readwrite("repetition_penalty", &OwnedSampleRow::repetition_penalty)
      .def_readwrite("presence_penalty", &OwnedSampleRow::presence_penalty)
      .def_readwrite("frequency_penalty", &OwnedSampleRow::frequency_penalty)
      .def_readwrite("seed", &OwnedSampleRow::seed)
      .def_readwrite("position", &OwnedSampleRow::position)
      .def_readwrite("num_top_logprobs", &OwnedSampleRow::num_top_logprobs)
      .def_readwrite("want_logprob", &OwnedSampleRow::want_logprob)
      .def_readwrite("forced_token", &OwnedSampleRow::forced_token)
      .def_readwrite("prompt", &OwnedSampleRow::prompt_ids)
      .def_readwrite("output", &OwnedSampleRow::output_ids)
      .def_readwrite("banned", &OwnedSampleRow::banned_ids)
      .def_readwrite("logit_bias", &OwnedSampleRow::bias)
      .def_readwrite("mask", &OwnedSampleRow::mask_words);
  py::class_<BackendOps>(m, "BackendOps")
      .def(py::init<const std::string&, const std::string&, int, const std::optional<std::string>&,
                    const std::optional<std::string>&>(),
           py::arg("device"), py::arg("isa") = "", py::arg("threads") = 2,
           py::arg("adapter_dtype") = py::none(), py::arg("activation_dtype") = py::none())
      .def_property_readonly("name", &BackendOps::name)
      .def("register_host_memory", &BackendOps::RegisterHostMemory, py::arg("memory"))
      .def("unregister_host_memory", &BackendOps::UnregisterHostMemory)
      .def("install_reads", &BackendOps::InstallReads)
      .def("gemm", &BackendOps::Gemm, py::arg("x"), py::arg("parts"),
           py::arg("bias") = std::vector<float>{}, py::arg("dtype") = "float32",
           py::arg("y") = py::none())
      .def("embed", &BackendOps::Embed, py::arg("table"), py::arg("dtype"), py::arg("ids"))
      .def("rms_norm", &BackendOps::RmsNorm, py::arg("x"), py::arg("weight"), py::arg("group"),
           py::arg("eps"), py::arg("in_place") = false)
      .def("silu_mul", &BackendOps::SiluMul, py::arg("gate_up"))
      .def("gather_rows", &BackendOps::GatherRows, py::arg("x"), py::arg("rows"))
      .def("attention", &BackendOps::Attention, py::arg("shape"), py::arg("inverse_frequencies"),
           py::arg("window"), py::arg("qkv"), py::arg("steps"))
      .def("lora", &BackendOps::Lora, py::arg("x"), py::arg("y"), py::arg("adapters"),
           py::arg("segments"), py::arg("targets"), py::arg("page_bytes"))
      .def("adapter_bytes", &BackendOps::AdapterBytes, py::arg("modules"), py::arg("page_bytes"))
      .def("sample", &BackendOps::Sample, py::arg("logits"), py::arg("rows"));
}

}  // namespace loraserve
