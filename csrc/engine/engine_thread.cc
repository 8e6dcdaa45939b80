#include "engine/engine_thread.h"

#include <future>
#include <iterator>

#include "base/clock.h"

namespace loraserve {

namespace {
Status Stopped() { return Status(StatusCode::kUnavailable, "engine: has stopped"); }
}  // namespace

EngineThread::EngineThread(std::unique_ptr<Engine> engine)
    : engine_(std::move(engine)), stats_(engine_->stats()) {
  engine_->OnWake([this] {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      woken_ = true;
    }
    wake_.notify_one();
  });
  thread_ = std::thread([this] { Loop(); });
}

EngineThread::~EngineThread() { Stop(); }

void EngineThread::Stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  const std::lock_guard<std::mutex> joining(join_mutex_);
  if (thread_.joinable()) thread_.join();
}

void EngineThread::Post(Command command) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    commands_.push_back(std::move(command));
  }
  wake_.notify_one();
}

Status EngineThread::Submit(Request request) {
  Status status = engine_->Validate(request);
  if (!status.ok()) return status;
  request.submitted = MonotonicSeconds();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stop_) return Stopped();
    if (!live_.insert(request.id).second) {
      return Status(StatusCode::kAlreadyExists, "request_id: is in use");
    }
    commands_.push_back([request = std::move(request)](Engine& engine) mutable {
      engine.Submit(std::move(request));
    });
  }
  wake_.notify_one();
  return Status();
}

void EngineThread::Abort(RequestId id) {
  Post([id](Engine& engine) { engine.Abort(id); });
}

Status EngineThread::Ask(std::function<Status(Engine&)> call) {
  const auto answer = std::make_shared<std::promise<Status>>();
  std::future<Status> future = answer->get_future();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stop_) return Stopped();
    commands_.push_back(
        [call = std::move(call), answer](Engine& engine) { answer->set_value(call(engine)); });
  }
  wake_.notify_one();
  return future.get();
}

Status EngineThread::AddAdapter(AdapterId id, AdapterSource source) {
  Status status = engine_->ValidateAdapter(source);
  if (!status.ok()) return status;
  return Ask([id, source = std::move(source)](Engine& engine) mutable {
    return engine.AddAdapter(id, std::move(source));
  });
}

Status EngineThread::RemoveAdapter(AdapterId id) {
  return Ask([id](Engine& engine) { return engine.RemoveAdapter(id); });
}

void EngineThread::Prefetch(AdapterId id) {
  Post([id](Engine& engine) { engine.Prefetch(id); });
}

std::optional<StepReport> EngineThread::WaitReport(double timeout_s) {
  std::unique_lock<std::mutex> lock(mutex_);
  reported_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                     [&] { return !report_.empty() || stopped_; });
  if (stopped_ && report_.empty()) return std::nullopt;
  return std::exchange(report_, {});
}

EngineStats EngineThread::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void EngineThread::AwaitWork(std::unique_lock<std::mutex>& lock) {
  const auto ready = [&] { return !commands_.empty() || woken_ || stop_; };
  // A request that waits for its adapter may expire first.
  const double deadline = engine_->NextDeadline();
  if (deadline <= 0) return wake_.wait(lock, ready);
  wake_.wait_for(lock, std::chrono::duration<double>(deadline - MonotonicSeconds()), ready);
}

void EngineThread::Loop() {
  bool idle = true;  // nothing to step: wait for a command
  for (;;) {
    std::vector<Command> commands;
    bool stop;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      if (idle) AwaitWork(lock);
      woken_ = false;
      commands = std::exchange(commands_, {});
      stop = stop_;
    }
    for (Command& command : commands) command(*engine_);
    if (stop) break;
    // Also without requests: a removed adapter is reported by a step.
    StepReport step = engine_->Step(MonotonicSeconds());
    idle = !engine_->HasWork();
    const EngineStats stats = engine_->stats();
    bool report = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stats_ = stats;
      report = !step.empty();
      for (const Output& output : step.outputs) {
        if (output.finish_reason != FinishReason::kNone) live_.erase(output.id);
      }
      report_.Append(std::move(step));
    }
    if (report) reported_.notify_one();
  }
  engine_->Stop();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  reported_.notify_all();
}

}  // namespace loraserve
