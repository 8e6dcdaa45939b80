// The scheduler for Python tests, with a model that answers every draw with the same token.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/raise.h"
#include "bindings/testing.h"
#include "engine/scheduler.h"

namespace py = pybind11;

namespace loraserve {
namespace {

constexpr int32_t kDrawn = 7;

// A step as plain tuples.
struct TestStep {
  std::vector<std::tuple<RequestId, int32_t, int32_t, bool>> items;  // id, begin, count, samples
  std::vector<std::pair<AdapterId, std::vector<PageId>>> started;    // installations
  std::vector<AdapterId> evicted;
  std::vector<RequestId> finished;
  std::map<RequestId, std::vector<PageId>> pages;  // of the KV blocks of the running sequences
};

class TestScheduler {
 public:
  TestScheduler(const SchedulerConfig& config, uint32_t pages)
      : scheduler_(config, Unwrap(PageArena::Create(4096, pages))) {}

  void AddAdapter(AdapterId id, uint32_t pages) {
    RaiseIfError(scheduler_.AddAdapter(id, pages, uint64_t{pages} * 4096));
  }
  void RemoveAdapter(AdapterId id) { RaiseIfError(scheduler_.RemoveAdapter(id)); }
  std::vector<AdapterId> TakeRemoved() {
    std::vector<AdapterId> removed;
    for (const auto& one : scheduler_.TakeRemoved()) removed.push_back(one.id);
    return removed;
  }

  void EndInstall(AdapterId id, bool complete) { scheduler_.EndInstall(id, complete); }
  void Prefetch(AdapterId id, bool evict) { scheduler_.Prefetch(id, evict); }
  void SetCosts(double prefill_token, double install, double install_byte) {
    scheduler_.SetCosts({prefill_token, install, install_byte});
  }
  std::vector<AdapterId> TakeUnneeded() { return scheduler_.TakeUnneeded(); }
  std::vector<AdapterId> Installing() const {
    std::vector<AdapterId> ids;
    for (const auto& [id, bytes] : scheduler_.adapters().installing()) ids.push_back(id);
    std::sort(ids.begin(), ids.end());
    return ids;
  }

  void Add(RequestId id, const std::vector<int32_t>& prompt, int32_t max_tokens, AdapterId adapter,
           int32_t priority, double deadline) {
    auto sequence = std::make_unique<Sequence>();
    sequence->tokens = prompt;
    Request& request = sequence->request;
    request.id = id;
    request.prompt = prompt;
    request.params.max_tokens = max_tokens;
    request.adapter = adapter;
    request.cache_namespace = std::to_string(adapter);
    request.priority = priority;
    request.deadline = deadline;
    RaiseIfError(scheduler_.Add(std::move(sequence)));
  }
  bool Take(RequestId id) { return scheduler_.Take(id) != nullptr; }

  TestStep Step() {
    const StepBatch batch = scheduler_.Schedule();
    TestStep step;
    for (const AdapterChange& change : batch.changes) {
      if (change.install) {
        step.started.emplace_back(change.adapter, change.pages);
      } else {
        step.evicted.push_back(change.adapter);
      }
    }
    for (const StepItem& item : batch.items) {
      step.items.emplace_back(item.sequence->request.id, item.begin, item.count, item.samples);
      std::vector<PageId>& pages = step.pages[item.sequence->request.id];
      for (const Sequence::Block& block : item.sequence->blocks) {
        const auto own = scheduler_.blocks().pages(block.id);
        pages.insert(pages.end(), own.begin(), own.end());
      }
    }
    scheduler_.Computed(batch);
    for (const StepItem& item : batch.items) {
      if (!item.samples) continue;
      Sequence& sequence = *item.sequence;
      sequence.tokens.push_back(kDrawn);
      if (sequence.num_output() < sequence.request.params.max_tokens) continue;
      step.finished.push_back(sequence.request.id);
      scheduler_.Take(sequence.request.id);
    }
    return step;
  }

  std::vector<RequestId> Expired(double now) const { return scheduler_.Expired(now); }
  size_t running() const { return scheduler_.num_running(); }
  size_t waiting() const { return scheduler_.num_waiting(); }
  uint32_t pages(PageUse use) const { return scheduler_.arena().count(use); }
  std::map<std::string, uint64_t> counters() const {
    const SchedulerCounters& c = scheduler_.counters();
    return {{"preemptions", c.preemptions},
            {"prefix_hit_tokens", c.prefix_hit_tokens},
            {"evictions", c.evictions}};
  }

 private:
  Scheduler scheduler_;
};

}  // namespace

void BindScheduler(py::module_& m) {
  py::class_<TestStep>(m, "Step")
      .def_readonly("items", &TestStep::items)
      .def_readonly("started", &TestStep::started)
      .def_readonly("evicted", &TestStep::evicted)
      .def_readonly("finished", &TestStep::finished)
      .def_readonly("pages", &TestStep::pages);
  const SchedulerConfig defaults;
  py::class_<TestScheduler>(m, "Scheduler")
      .def(py::init([](uint32_t pages, uint32_t pages_per_block, int32_t max_batch_tokens,
                       int32_t max_sequences, uint64_t max_step_adapter_bytes,
                       uint64_t max_install_bytes, int32_t max_overtakes, bool prefix_cache) {
             return std::make_unique<TestScheduler>(
                 SchedulerConfig{.pages_per_block = pages_per_block,
                                 .max_batch_tokens = max_batch_tokens,
                                 .max_sequences = max_sequences,
                                 .max_step_adapter_bytes = max_step_adapter_bytes,
                                 .max_install_bytes = max_install_bytes,
                                 .max_overtakes = max_overtakes,
                                 .prefix_cache = prefix_cache},
                 pages);
           }),
           py::arg("pages"), py::kw_only(), py::arg("pages_per_block") = defaults.pages_per_block,
           py::arg("max_batch_tokens") = defaults.max_batch_tokens,
           py::arg("max_sequences") = defaults.max_sequences,
           py::arg("max_step_adapter_bytes") = defaults.max_step_adapter_bytes,
           py::arg("max_install_bytes") = defaults.max_install_bytes,
           py::arg("max_overtakes") = defaults.max_overtakes,
           py::arg("prefix_cache") = defaults.prefix_cache)
      .def("add_adapter", &TestScheduler::AddAdapter, py::arg("id"), py::arg("pages"))
      .def("remove_adapter", &TestScheduler::RemoveAdapter, py::arg("id"))
      .def("take_removed", &TestScheduler::TakeRemoved)
      .def("end_install", &TestScheduler::EndInstall, py::arg("id"), py::arg("complete") = true)
      .def("prefetch", &TestScheduler::Prefetch, py::arg("id"), py::arg("evict") = false)
      .def("set_costs", &TestScheduler::SetCosts, py::arg("prefill_token"), py::arg("install"),
           py::arg("install_byte"))
      .def("take_unneeded", &TestScheduler::TakeUnneeded)
      .def_property_readonly("installing", &TestScheduler::Installing)
      .def("add", &TestScheduler::Add, py::arg("id"), py::arg("prompt"), py::arg("max_tokens") = 1,
           py::arg("adapter") = 0, py::arg("priority") = 0, py::arg("deadline") = 0.0)
      .def("take", &TestScheduler::Take, py::arg("id"))
      .def("step", &TestScheduler::Step)
      .def("expired", &TestScheduler::Expired, py::arg("now"))
      .def("pages", &TestScheduler::pages, py::arg("use"))
      .def_property_readonly("running", &TestScheduler::running)
      .def_property_readonly("waiting", &TestScheduler::waiting)
      .def_property_readonly("counters", &TestScheduler::counters);
}

}  // namespace loraserve
