// What the sidecar does for reads, inside the node: GPUDirect needs the process that has the GPU's
// context. Loaded only where GPUDirect is switched on and a dry run has proven it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "base/status.h"
#include "transfer/messages.h"
#include "transfer/remote_read.h"
#include "transfer/ucx_transport.h"

namespace loraserve {

class SlotReader {
 public:
  // Sets UCX's environment for this process (ApplyUcxEnvironment). kFailedPrecondition.
  static Result<std::unique_ptr<SlotReader>> Create(const UcxSettings& settings);
  ~SlotReader();
  SlotReader(const SlotReader&) = delete;
  SlotReader& operator=(const SlotReader&) = delete;

  // Where reads go: `bytes` at `memory`, which stays until this object has gone. Once.
  // kFailedPrecondition where no network card can write there.
  Status Register(void* memory, uint64_t bytes, MemoryKind kind);
  // Blocks; one at a time, others wait. `request.local_offset` is in the registered memory. The
  // transports it went over, comma separated, or the error of RemoteRead; nothing writes to the
  // memory any more when it returns, unless stuck().
  Result<std::string> Read(ReadRequest request);
  // A forced close did not end a read: the memory may be written for as long as the process lives.
  // Reads nothing any more, and never lets UCX or its registration go.
  bool stuck() const { return stuck_; }

  std::string ucx_version() const { return transport_->ucx_version(); }
  // As UcxTransport's.
  std::string transports() const { return transport_->transports(); }

 private:
  explicit SlotReader(std::unique_ptr<UcxTransport> transport);

  std::unique_ptr<UcxTransport> transport_;
  std::mutex mutex_;  // of what follows, and of the transport's use
  uint8_t* scratch_ = nullptr;
  uint8_t* memory_ = nullptr;
  uint64_t bytes_ = 0;
  std::atomic<bool> stuck_ = false;  // asked for while a read runs
};

}  // namespace loraserve
