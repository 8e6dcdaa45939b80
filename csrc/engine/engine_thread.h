// An Engine on its own thread. Every method is thread-safe.
//
// The thread never calls back into the caller: outputs are collected by WaitReport, one wake-up for
// each step, so a binding can hold no lock of an interpreter while the engine runs.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_set>
#include <vector>

#include "engine/engine.h"

namespace loraserve {

class EngineThread {
 public:
  explicit EngineThread(std::unique_ptr<Engine> engine);
  ~EngineThread();  // Stop()
  EngineThread(const EngineThread&) = delete;
  EngineThread& operator=(const EngineThread&) = delete;

  // Checks the request at once; what only the engine can know (adapter, pages) comes as an Output.
  // kAlreadyExists while a request of this id is unfinished; kUnavailable once stopped.
  Status Submit(Request request);
  // Ends the request with kCancelled; nothing if it has ended.
  void Abort(RequestId id);
  // Waits for the current step. The bytes behind `source` stay valid until a report lists the id.
  Status AddAdapter(AdapterId id, AdapterSource source);
  // Running requests go on; new ones are refused. A report lists the id when the last has ended.
  Status RemoveAdapter(AdapterId id);

  // See Engine; nothing if the adapter is not there.
  void Prefetch(AdapterId id);

  // Blocks until a step brought something, `timeout_s` has passed or the engine has stopped. One
  // caller at a time. Nothing once it has stopped and everything was taken.
  std::optional<StepReport> WaitReport(double timeout_s);

  EngineStats stats() const;
  std::string backend_name() const { return engine_->backend_name(); }
  // As Backend's. The memory stays until this object has gone.
  Result<bool> RegisterHostMemory(void* memory, uint64_t bytes) {
    return engine_->RegisterHostMemory(memory, bytes);
  }
  // Ends the thread after its current step; unfinished requests and installations are forgotten.
  // Returns, to every caller, when it has ended: no adapter's bytes are read any more.
  void Stop();

 private:
  using Command = std::function<void(Engine&)>;
  void Loop();
  // Until there is a reason for a step.
  void AwaitWork(std::unique_lock<std::mutex>& lock);
  void Post(Command command);
  // Runs `call` on the engine's thread and returns its answer.
  Status Ask(std::function<Status(Engine&)> call);

  std::unique_ptr<Engine> engine_;
  mutable std::mutex mutex_;
  std::condition_variable wake_;      // commands_, woken_ or stop_ changed
  std::condition_variable reported_;  // report_ or stopped_ changed
  std::vector<Command> commands_;
  StepReport report_;
  std::unordered_set<RequestId> live_;  // submitted and not reported as finished
  EngineStats stats_;
  bool woken_ = false;  // by the engine, see Engine::OnWake
  bool stop_ = false;
  bool stopped_ = false;
  std::mutex join_mutex_;  // never taken inside mutex_
  std::thread thread_;
};

}  // namespace loraserve
