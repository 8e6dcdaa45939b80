// Writes adapters into pages on a thread of its own, beside the steps.
//
// Several adapters may be under way. Every second part written is of the one that was begun first
// and the others are of the one with least left: a small adapter does not wait for a large one, and
// a large one gets at least half of the thread's time. While the engine decodes, the thread takes
// breaks, because what it moves through the memory slows down the step beside it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "backend/backend.h"
#include "lora/residency.h"

namespace loraserve {

class Installer {
 public:
  struct Done {
    AdapterId id = 0;
    std::unique_ptr<InstalledAdapter> adapter;  // null: given up, or `error`
    Status error;                               // why it could not be begun
    double seconds = 0;                         // from Start to the end
    double writing_seconds = 0;                 // of those, without breaks and other adapters
  };

  // `backend` outlives the installer. `on_done` is called by the installer's thread after each
  // adapter that has ended; it must not call back.
  Installer(Backend* backend, std::function<void()> on_done);
  ~Installer();  // Stop()
  Installer(const Installer&) = delete;
  Installer& operator=(const Installer&) = delete;

  // The rest is called by one thread, the engine's.

  // What `source` points to stays valid until TakeDone() lists the id. `bytes` is what is to be
  // written.
  void Start(AdapterId id, std::shared_ptr<const AdapterSource> source, std::vector<PageId> pages,
             uint64_t bytes);
  // Gives the adapter up, soon; nothing if it has ended. TakeDone() lists it either way.
  void GiveUp(AdapterId id);
  // What has ended since the last call: its pages are not written any more.
  std::vector<Done> TakeDone();
  // Whether a step runs beside the installer that somebody waits for.
  void SetDecoding(bool decoding) { decoding_.store(decoding, std::memory_order_relaxed); }
  // Ends the thread after the part that it is writing; unfinished adapters are given up.
  void Stop();

 private:
  struct Job {
    AdapterId id = 0;
    std::shared_ptr<const AdapterSource> source;
    std::vector<PageId> pages;
    uint64_t left = 0;  // bytes, about
    double started = 0;
    double writing_seconds = 0;
    bool unneeded = false;
    std::unique_ptr<AdapterInstall> install;
  };

  void Loop();
  Job* Next();  // under the lock
  // The adapter if this was its last part, else null.
  Result<std::unique_ptr<InstalledAdapter>> WritePart(Job& job);

  Backend* backend_;
  std::function<void()> on_done_;
  std::mutex mutex_;
  std::condition_variable wake_;  // jobs_ or stop_ changed
  std::list<Job> jobs_;           // oldest first; the thread may hold a pointer to one
  std::vector<Done> done_;
  bool stop_ = false;
  bool oldest_next_ = false;
  std::atomic<bool> decoding_{false};
  std::thread thread_;
};

}  // namespace loraserve
