#include "engine/installer.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/clock.h"

#if defined(__linux__)
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace loraserve {

namespace {

// What is written between two looks at the jobs: about a tenth of a millisecond.
constexpr uint64_t kPartBytes = 256 << 10;
// Breaks while the engine decodes, in parts of the time that writing took.
constexpr double kBreak = 1.0;
// Where cores are short, the engine's threads go first: so much nicer than they is the installer's.
constexpr int kNicer = 5;

// The calling thread's alone; where the system has no such thing, all are equal.
void LowerPriority() {
#if defined(__linux__)
  const auto thread = static_cast<id_t>(syscall(SYS_gettid));
  setpriority(PRIO_PROCESS, thread, getpriority(PRIO_PROCESS, thread) + kNicer);
#endif
}

}  // namespace

Installer::Installer(Backend* backend, std::function<void()> on_done)
    : backend_(backend), on_done_(std::move(on_done)), thread_([this] { Loop(); }) {}

Installer::~Installer() { Stop(); }

void Installer::Stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void Installer::Start(AdapterId id, std::shared_ptr<const AdapterSource> source,
                      std::vector<PageId> pages, uint64_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back({.id = id,
                     .source = std::move(source),
                     .pages = std::move(pages),
                     .left = bytes,
                     .started = MonotonicSeconds()});
  }
  wake_.notify_one();
}

void Installer::GiveUp(AdapterId id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Job& job : jobs_) job.unneeded |= job.id == id;
}

std::vector<Installer::Done> Installer::TakeDone() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(done_, {});
}

Installer::Job* Installer::Next() {
  oldest_next_ = !oldest_next_;
  if (oldest_next_) return &jobs_.front();
  return &*std::min_element(jobs_.begin(), jobs_.end(),
                            [](const Job& a, const Job& b) { return a.left < b.left; });
}

Result<std::unique_ptr<InstalledAdapter>> Installer::WritePart(Job& job) {
  if (job.install == nullptr) {
    auto install = backend_->StartInstall(*job.source, job.pages);
    if (!install.ok()) return install.status();
    job.install = std::move(install.value());
  }
  if (job.install->Write(kPartBytes)) return std::unique_ptr<InstalledAdapter>();
  return job.install->Finish();
}

void Installer::Loop() {
  LowerPriority();
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
    if (stop_) return;
    Job* const job = Next();
    std::unique_ptr<InstalledAdapter> adapter;
    Status error;
    if (!job->unneeded) {
      lock.unlock();
      const double begin = MonotonicSeconds();
      auto written = WritePart(*job);
      if (written.ok()) {
        adapter = std::move(written.value());
      } else {
        error = written.status();
      }
      const double seconds = MonotonicSeconds() - begin;
      lock.lock();
      job->writing_seconds += seconds;
      if (adapter == nullptr && error.ok()) {
        job->left -= std::min(job->left, kPartBytes);
        if (decoding_.load(std::memory_order_relaxed)) {
          wake_.wait_for(lock, std::chrono::duration<double>(kBreak * seconds),
                         [&] { return stop_; });
        }
        continue;
      }
    }
    done_.push_back({.id = job->id,
                     .adapter = std::move(adapter),
                     .error = std::move(error),
                     .seconds = MonotonicSeconds() - job->started,
                     .writing_seconds = job->writing_seconds});
    jobs_.remove_if([&](const Job& other) { return &other == job; });
    lock.unlock();
    on_done_();
    lock.lock();
  }
}

}  // namespace loraserve
