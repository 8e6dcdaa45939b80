// One-sided reads of other processes' memory, as the sidecar needs them.
//
// One thread owns a Transport and all that comes from it. Completions are only delivered by
// Progress, never from inside another call.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

namespace loraserve {

// How a Get ended.
enum class GetOutcome {
  kDone,
  // The endpoint was closed by force for another read's sake: trying again may succeed.
  kBroken,
  // The peer is gone, does not answer or refuses.
  kFailed,
};

using GetDone = std::function<void(GetOutcome outcome, const std::string& why)>;

// A peer's memory that this process may read, by way of an endpoint that others may share. It goes
// after its last Get has ended.
class RemoteMemory {
 public:
  virtual ~RemoteMemory() = default;
  // Reads `bytes` at `address` of the peer into registered memory of this process, which must stay
  // until `done` is called.
  virtual void Get(uint64_t address, void* into, size_t bytes, GetDone done) = 0;
  // What the endpoint goes over, comma separated; empty where UCX does not say.
  virtual std::string transports() const = 0;
  // Closes the endpoint by force: every Get over it, of every reader, ends soon. What is opened
  // later has a new endpoint.
  virtual void Break() = 0;
};

struct ExportedMemory {
  uint64_t address;
  std::string rkey;  // wrapped (envelope.h)
};

class Transport {
 public:
  virtual ~Transport() = default;
  // `worker_address` and `rkey` are wrapped. kInvalidArgument, kFailedPrecondition (no transport
  // allowed here reaches the peer), kUnavailable.
  virtual Result<std::shared_ptr<RemoteMemory>> Open(std::string_view worker_address,
                                                     std::string_view rkey) = 0;
  // Registers `bytes` at `memory`, of the pool, for peers to read, never to write.
  // kAlreadyExists, kResourceExhausted.
  virtual Result<ExportedMemory> Export(void* memory, size_t bytes) = 0;
  virtual void Withdraw(void* memory) = 0;
  // Does work that is due, within about 2 ms; true where more may be due at once.
  virtual bool Progress() = 0;
  // How long the thread may sleep, in milliseconds, unless `event_fd` becomes readable; -1: as long
  // as it likes. To be asked after everything else, right before it sleeps.
  virtual int SleepMs() = 0;
  virtual int event_fd() const = 0;
};

}  // namespace loraserve
