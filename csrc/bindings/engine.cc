// _engine: the engine for Python. loraserve/engine/ is its only importer and its typed face.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <new>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "bindings/device_staging.h"
#include "bindings/host_array.h"
#include "bindings/raise.h"
#include "engine/engine_thread.h"

namespace py = pybind11;

namespace loraserve {
namespace {

std::string FinishName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kError:
      return "error";
  }
  return "";
}

// Holds the arrays of loaded adapters: the engine reads them until it reports the id as removed.
class BoundEngine {
 public:
  BoundEngine(const EngineConfig& config, const ModelConfig& model, const ModelWeights& weights) {
    const py::gil_scoped_release release;
    try {
      thread_ = std::make_unique<EngineThread>(Unwrap(Engine::Create(config, model, weights)));
    } catch (const std::bad_alloc&) {
      // Large blocks report themselves; this is one of the small ones after them.
      throw StatusException{Status(StatusCode::kResourceExhausted,
                                   "memory: the machine has none left to load the model")};
    }
  }
  // The thread may be in the middle of a step: joined without the interpreter's lock.
  ~BoundEngine() { Stop(); }

  void Submit(Request request, double timeout_s) {
    const py::gil_scoped_release release;
    if (timeout_s > 0) request.deadline = MonotonicSeconds() + timeout_s;
    RaiseIfError(thread_->Submit(std::move(request)));
  }
  void Abort(RequestId id) {
    const py::gil_scoped_release release;
    thread_->Abort(id);
  }
  using Module = std::tuple<int, std::string, int, float, py::array, py::array>;
  void AddAdapter(AdapterId id, const std::vector<Module>& modules) {
    AdapterSource source;
    std::vector<py::array> arrays;
    for (const auto& [layer, name, rank, scaling, a, b] : modules) {
      const auto found = std::find(kLinearModuleNames.begin(), kLinearModuleNames.end(), name);
      if (found == kLinearModuleNames.end()) throw py::value_error("module: '" + name + "'");
      source.modules.push_back(
          {.layer = layer,
           .module = static_cast<LinearModule>(found - kLinearModuleNames.begin()),
           .rank = rank,
           .scaling = scaling,
           .a = ViewOf(a),
           .b = ViewOf(b)});
      arrays.push_back(a);
      arrays.push_back(b);
    }
    held_[id] = std::move(arrays);
    Status status;
    {
      const py::gil_scoped_release release;
      status = thread_->AddAdapter(id, std::move(source));
    }
    if (!status.ok()) held_.erase(id);
    RaiseIfError(status);
  }
  void RemoveAdapter(AdapterId id) {
    const py::gil_scoped_release release;
    RaiseIfError(thread_->RemoveAdapter(id));
  }
  void Prefetch(AdapterId id) {
    const py::gil_scoped_release release;
    thread_->Prefetch(id);
  }
  std::optional<StepReport> WaitReport(double timeout_s) {
    std::optional<StepReport> report;
    {
      const py::gil_scoped_release release;
      report = thread_->WaitReport(timeout_s);
    }
    if (report) {
      for (const AdapterId id : report->removed_adapters) held_.erase(id);
    }
    return report;
  }
  bool RegisterHostMemory(const py::buffer& buffer) {
    // Holds the mapping for as long as the backend may have it registered.
    auto memory = std::make_unique<py::buffer_info>(buffer.request(/*writable=*/true));
    bool registered = false;
    {
      const py::gil_scoped_release release;
      registered = Unwrap(thread_->RegisterHostMemory(
          memory->ptr, static_cast<uint64_t>(memory->size * memory->itemsize)));
    }
    if (registered) registered_.push_back(std::move(memory));
    return registered;
  }
  EngineStats stats() const { return thread_->stats(); }
  std::string backend_name() const { return thread_->backend_name(); }
  void Stop() {
    const py::gil_scoped_release release;
    if (thread_) thread_->Stop();
  }

 private:
  std::unordered_map<AdapterId, std::vector<py::array>> held_;
  std::vector<std::unique_ptr<py::buffer_info>> registered_;  // after the thread, which ends first
  std::unique_ptr<EngineThread> thread_;
};

void BindConfig(py::module_& m) {
  py::class_<EngineConfig>(m, "EngineConfig")
      .def(py::init<>())
      .def_property(
          "device", [](const EngineConfig& c) { return c.backend.device; },
          [](EngineConfig& c, const std::string& device) { c.backend.device = device; })
      .def_property(
          "threads", [](const EngineConfig& c) { return c.backend.threads; },
          [](EngineConfig& c, int threads) { c.backend.threads = threads; })
      .def_property(
          "isa", [](const EngineConfig& c) { return c.backend.isa; },
          [](EngineConfig& c, const std::string& isa) { c.backend.isa = isa; })
      .def(
          "set_dtypes",
          [](EngineConfig& c, const std::string& weight, const std::optional<std::string>& adapter,
             const std::optional<std::string>& activation) {
            c.weight_dtype = ParseDType(weight);
            c.backend.adapter_dtype = std::nullopt;
            if (adapter) c.backend.adapter_dtype = ParseDType(*adapter);
            c.backend.activation_dtype = std::nullopt;
            if (activation) c.backend.activation_dtype = ParseDType(*activation);
          },
          py::arg("weight"), py::arg("adapter"), py::arg("activation"))
      .def_readwrite("memory_bytes", &EngineConfig::memory_bytes)
      .def_readwrite("block_size", &EngineConfig::block_size)
      .def_readwrite("page_bytes", &EngineConfig::page_bytes)
      .def_readwrite("max_batch_tokens", &EngineConfig::max_batch_tokens)
      .def_readwrite("max_sequences", &EngineConfig::max_sequences)
      .def_readwrite("max_step_adapter_bytes", &EngineConfig::max_step_adapter_bytes)
      .def_readwrite("prefix_cache", &EngineConfig::prefix_cache)
      .def_readwrite("prefetch", &EngineConfig::prefetch)
      .def_readwrite("record_steps", &EngineConfig::record_steps);
  py::class_<ModelConfig>(m, "ModelConfig")
      .def(py::init<>())
      .def_readwrite("vocab_size", &ModelConfig::vocab_size)
      .def_readwrite("hidden_size", &ModelConfig::hidden_size)
      .def_readwrite("num_layers", &ModelConfig::num_layers)
      .def_readwrite("num_heads", &ModelConfig::num_heads)
      .def_readwrite("num_kv_heads", &ModelConfig::num_kv_heads)
      .def_readwrite("head_dim", &ModelConfig::head_dim)
      .def_readwrite("intermediate_size", &ModelConfig::intermediate_size)
      .def_readwrite("max_position", &ModelConfig::max_position)
      .def_readwrite("rms_norm_eps", &ModelConfig::rms_norm_eps)
      .def_readwrite("inverse_frequencies", &ModelConfig::inverse_frequencies)
      .def_readwrite("windows", &ModelConfig::windows);
}

void BindWeights(py::module_& m) {
  py::class_<HostMatrix>(m, "HostMatrix")
      .def(py::init(&ViewOf), py::arg("array"), py::keep_alive<1, 2>())
      .def_readonly("rows", &HostMatrix::rows)
      .def_readonly("cols", &HostMatrix::cols);
  py::class_<LayerWeights>(m, "LayerWeights")
      .def(py::init<>())
      .def_readwrite("input_norm", &LayerWeights::input_norm)
      .def_readwrite("post_norm", &LayerWeights::post_norm)
      .def_readwrite("q", &LayerWeights::q)
      .def_readwrite("k", &LayerWeights::k)
      .def_readwrite("v", &LayerWeights::v)
      .def_readwrite("o", &LayerWeights::o)
      .def_readwrite("gate", &LayerWeights::gate)
      .def_readwrite("up", &LayerWeights::up)
      .def_readwrite("down", &LayerWeights::down)
      .def_readwrite("q_bias", &LayerWeights::q_bias)
      .def_readwrite("k_bias", &LayerWeights::k_bias)
      .def_readwrite("v_bias", &LayerWeights::v_bias)
      .def_readwrite("q_norm", &LayerWeights::q_norm)
      .def_readwrite("k_norm", &LayerWeights::k_norm);
  py::class_<ModelWeights>(m, "ModelWeights")
      .def(py::init<>())
      .def_readwrite("embed_tokens", &ModelWeights::embed_tokens)
      .def_readwrite("final_norm", &ModelWeights::final_norm)
      .def_readwrite("lm_head", &ModelWeights::lm_head)
      .def("add_layer", [](ModelWeights& weights, const LayerWeights& layer) {
        weights.layers.push_back(layer);
      });
}

void BindRequest(py::module_& m) {
  py::class_<SamplingParams>(m, "SamplingParams")
      .def(py::init<>())
      .def_readwrite("max_tokens", &SamplingParams::max_tokens)
      .def_readwrite("min_tokens", &SamplingParams::min_tokens)
      .def_readwrite("temperature", &SamplingParams::temperature)
      .def_readwrite("top_k", &SamplingParams::top_k)
      .def_readwrite("top_p", &SamplingParams::top_p)
      .def_readwrite("min_p", &SamplingParams::min_p)
      .def_readwrite("repetition_penalty", &SamplingParams::repetition_penalty)
      .def_readwrite("presence_penalty", &SamplingParams::presence_penalty)
      .def_readwrite("frequency_penalty", &SamplingParams::frequency_penalty)
      .def_readwrite("seed", &SamplingParams::seed)
      .def_readwrite("logit_bias", &SamplingParams::logit_bias)
      .def_readwrite("stop_token_ids", &SamplingParams::stop_token_ids)
      .def_readwrite("logprobs", &SamplingParams::logprobs)
      .def_readwrite("prompt_logprobs", &SamplingParams::prompt_logprobs);
  py::class_<Request>(m, "Request")
      .def(py::init<>())
      .def_readwrite("id", &Request::id)
      .def_readwrite("prompt", &Request::prompt)
      .def_readwrite("resumed_tokens", &Request::resumed_tokens)
      .def_readwrite("params", &Request::params)
      .def_readwrite("adapter", &Request::adapter)
      .def_readwrite("cache_namespace", &Request::cache_namespace)
      .def_readwrite("priority", &Request::priority);
}

// (ids, first indices, tokens) of the outputs that are one further token of their request and
// nothing else, in order; they are not in `outputs` any more. As most are, and each costs the
// interpreter a little here instead of much. Those of a request that has another output in the
// report stay there.
using PlainOutputs = std::tuple<std::vector<RequestId>, std::vector<int32_t>, std::vector<int32_t>>;
PlainOutputs TakePlain(StepReport& report) {
  const auto is_plain = [](const Output& output) {
    return output.finish_reason == FinishReason::kNone && output.first_index > 0 &&
           output.token_ids.size() == 1 && output.logprobs.empty();
  };
  std::unordered_set<RequestId> others;
  for (const Output& output : report.outputs) {
    if (!is_plain(output)) others.insert(output.id);
  }
  PlainOutputs plain;
  std::erase_if(report.outputs, [&](const Output& output) {
    if (!is_plain(output) || others.contains(output.id)) return false;
    std::get<0>(plain).push_back(output.id);
    std::get<1>(plain).push_back(output.first_index);
    std::get<2>(plain).push_back(output.token_ids[0]);
    return true;
  });
  return plain;
}

void BindReport(py::module_& m) {
  py::class_<Output>(m, "Output")
      .def_readonly("id", &Output::id)
      .def_readonly("first_index", &Output::first_index)
      .def_readonly("token_ids", &Output::token_ids)
      .def_readonly("logprobs", &Output::logprobs)
      .def_readonly("top_logprobs", &Output::top_logprobs)
      .def_readonly("prompt_logprobs", &Output::prompt_logprobs)
      .def_readonly("prompt_top_logprobs", &Output::prompt_top_logprobs)
      .def_readonly("cached_tokens", &Output::cached_tokens)
      .def_readonly("queue_seconds", &Output::queue_seconds)
      .def_property_readonly("finish_reason",
                             [](const Output& output) { return FinishName(output.finish_reason); })
      .def_property_readonly(
          "error_code",
          [](const Output& output) -> std::string { return CodeName(output.error.code()); })
      .def_property_readonly("error_message",
                             [](const Output& output) { return output.error.message(); });
  py::class_<StepRecord>(m, "StepRecord")
      .def_readonly("seconds", &StepRecord::seconds)
      .def_readonly("prefill_tokens", &StepRecord::prefill_tokens)
      .def_readonly("decode_tokens", &StepRecord::decode_tokens)
      .def_readonly("context_tokens", &StepRecord::context_tokens)
      .def_readonly("chunk_context", &StepRecord::chunk_context)
      .def_readonly("token_ranks", &StepRecord::token_ranks)
      .def_readonly("adapters", &StepRecord::adapters)
      .def_readonly("adapter_bytes", &StepRecord::adapter_bytes)
      .def_readonly("max_rank", &StepRecord::max_rank)
      .def_readonly("installs", &StepRecord::installs);
  py::class_<StepReport>(m, "StepReport")
      .def_readonly("outputs", &StepReport::outputs)
      .def("take_plain", &TakePlain)
      .def_readonly("removed_adapters", &StepReport::removed_adapters)
      .def_readonly("installs", &StepReport::installs)
      .def_readonly("records", &StepReport::records);
  py::class_<EngineStats>(m, "EngineStats")
      .def_readonly("steps", &EngineStats::steps)
      .def_readonly("prompt_tokens", &EngineStats::prompt_tokens)
      .def_readonly("generated_tokens", &EngineStats::generated_tokens)
      .def_readonly("preemptions", &EngineStats::preemptions)
      .def_readonly("prefix_hit_tokens", &EngineStats::prefix_hit_tokens)
      .def_readonly("adapter_installs", &EngineStats::adapter_installs)
      .def_readonly("adapter_evictions", &EngineStats::adapter_evictions)
      .def_readonly("adapter_install_seconds", &EngineStats::adapter_install_seconds)
      .def_readonly("adapter_waits", &EngineStats::adapter_waits)
      .def_readonly("adapter_wait_seconds", &EngineStats::adapter_wait_seconds)
      .def_readonly("step_seconds", &EngineStats::step_seconds)
      .def_readonly("running", &EngineStats::running)
      .def_readonly("waiting", &EngineStats::waiting)
      .def_readonly("page_bytes", &EngineStats::page_bytes)
      .def_readonly("pages_free", &EngineStats::pages_free)
      .def_readonly("pages_kv", &EngineStats::pages_kv)
      .def_readonly("pages_adapter", &EngineStats::pages_adapter)
      .def_readonly("adapters_installed", &EngineStats::adapters_installed)
      .def_readonly("adapters_installing", &EngineStats::adapters_installing)
      .def_readonly("adapter_direct_bytes", &EngineStats::adapter_direct_bytes)
      .def_readonly("adapter_staged_bytes", &EngineStats::adapter_staged_bytes)
      .def_readonly("adapter_weight_bytes", &EngineStats::adapter_weight_bytes)
      .def_readonly("weight_bytes", &EngineStats::weight_bytes);
}

}  // namespace
}  // namespace loraserve

PYBIND11_MODULE(_engine, m) {
  using namespace loraserve;
  m.doc() = "The C++ engine. Use loraserve.engine, its typed face.";
  RegisterStatusError(m);
  BindConfig(m);
  BindWeights(m);
  BindRequest(m);
  BindReport(m);
  BindDeviceStaging(m);
  py::class_<BoundEngine>(m, "Engine")
      .def(py::init<const EngineConfig&, const ModelConfig&, const ModelWeights&>(),
           py::arg("config"), py::arg("model"), py::arg("weights"))
      .def("submit", &BoundEngine::Submit, py::arg("request"), py::arg("timeout_s") = 0.0)
      .def("abort", &BoundEngine::Abort, py::arg("id"))
      .def("add_adapter", &BoundEngine::AddAdapter, py::arg("id"), py::arg("modules"))
      .def("remove_adapter", &BoundEngine::RemoveAdapter, py::arg("id"))
      .def("prefetch", &BoundEngine::Prefetch, py::arg("id"))
      .def("wait_report", &BoundEngine::WaitReport, py::arg("timeout_s"))
      .def("register_host_memory", &BoundEngine::RegisterHostMemory, py::arg("memory"))
      .def("stats", &BoundEngine::stats)
      .def("backend_name", &BoundEngine::backend_name)
      .def("stop", &BoundEngine::Stop);
}
