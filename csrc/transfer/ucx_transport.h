// The Transport over UCX: ucxx's objects for what lives long (context, worker, address, endpoints),
// the UCP calls beneath them for what ucxx lacks: read-only registration, gets into registered
// memory, the list of resources.
#pragma once

#include <memory>
#include <string>

#include "base/status.h"
#include "transfer/transport.h"
#include "transfer/ucx_settings.h"

namespace loraserve {

// Of memory that reads write to.
enum class MemoryKind { kHost, kCuda };

class UcxTransport : public Transport {
 public:
  // kFailedPrecondition where UCX cannot start or offers what `settings` do not allow. REQUIRES
  // ApplyUcxEnvironment(settings) before.
  static Result<std::unique_ptr<UcxTransport>> Create(const UcxSettings& settings);

  // Reads may write there; must stay until this object goes. kResourceExhausted, where an RDMA
  // device cannot pin so much, or not memory of this kind.
  virtual Status RegisterLocal(void* memory, size_t bytes, MemoryKind kind = MemoryKind::kHost) = 0;
  // major.minor.patch of the library that runs, not of the headers.
  virtual std::string ucx_version() const = 0;
  // One-sided ones, comma separated; empty where there is none: nothing can be read then.
  virtual std::string transports() const = 0;
  // Wrapped (envelope.h).
  virtual std::string worker_address() const = 0;
};

}  // namespace loraserve
