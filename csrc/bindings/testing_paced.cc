// An engine without a model: every live request gets a token at each step, at a pace. It is what
// the way of a token from a step to a client is measured with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <vector>

#include "bindings/testing.h"
#include "engine/engine.h"

namespace py = pybind11;

namespace loraserve {
namespace {

using Clock = std::chrono::steady_clock;

class PacedEngine {
 public:
  // Tokens go round in [first_token, first_token + num_tokens).
  PacedEngine(double step_seconds, int32_t first_token, int32_t num_tokens)
      : step_(std::chrono::duration_cast<Clock::duration>(
            std::chrono::duration<double>(step_seconds))),
        first_token_(first_token),
        num_tokens_(num_tokens) {}

  void Submit(Request request, double /*timeout_s*/) {
    const std::lock_guard lock(mutex_);
    live_.push_back({.request = std::move(request)});
    wake_.notify_all();
  }
  void Abort(RequestId id) {
    const std::lock_guard lock(mutex_);
    for (Live& live : live_) {
      if (live.request.id == id) live.aborted = true;
    }
  }
  std::optional<StepReport> WaitReport(double timeout_s) {
    const py::gil_scoped_release release;
    std::unique_lock lock(mutex_);
    const Clock::time_point late = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                      std::chrono::duration<double>(timeout_s));
    wake_.wait_until(lock, late, [&] { return stopped_ || !live_.empty(); });
    if (!stopped_ && !live_.empty()) {
      next_ = std::max(next_ + step_, Clock::now());
      wake_.wait_until(lock, next_, [&] { return stopped_; });
    }
    if (stopped_) return std::nullopt;
    return Step();
  }
  EngineStats stats() const {
    const std::lock_guard lock(mutex_);
    return {.running = live_.size(), .pages_free = 1000};
  }
  void Stop() {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    wake_.notify_all();
  }

 private:
  struct Live {
    Request request;
    int32_t made = 0;
    bool aborted = false;
  };

  StepReport Step() {
    StepReport report;
    for (Live& live : live_) {
      Output output{.id = live.request.id, .first_index = live.made};
      if (live.aborted) {
        output.finish_reason = FinishReason::kCancelled;
      } else {
        output.token_ids.push_back(first_token_ +
                                   (live.made + static_cast<int32_t>(output.id)) % num_tokens_);
        if (++live.made >= live.request.params.max_tokens) {
          output.finish_reason = FinishReason::kLength;
        }
      }
      live.aborted = output.finish_reason != FinishReason::kNone;
      report.outputs.push_back(std::move(output));
    }
    std::erase_if(live_, [](const Live& live) { return live.aborted; });
    return report;
  }

  const Clock::duration step_;
  const int32_t first_token_;
  const int32_t num_tokens_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Live> live_;
  Clock::time_point next_;
  bool stopped_ = false;
};

}  // namespace

void BindPacedEngine(py::module_& m) {
  py::module_::import("loraserve._engine");  // has the types of requests and reports
  py::class_<PacedEngine>(m, "PacedEngine")
      .def(py::init<double, int32_t, int32_t>(), py::arg("step_seconds"), py::arg("first_token"),
           py::arg("num_tokens"))
      .def("submit", &PacedEngine::Submit, py::arg("request"), py::arg("timeout_s") = 0.0)
      .def("abort", &PacedEngine::Abort, py::arg("id"))
      .def("wait_report", &PacedEngine::WaitReport, py::arg("timeout_s"))
      .def("stats", &PacedEngine::stats)
      .def("backend_name", [](const PacedEngine&) { return "paced"; })
      .def("register_host_memory", [](const PacedEngine&, const py::buffer&) { return false; })
      .def("stop", &PacedEngine::Stop);
}

}  // namespace loraserve
