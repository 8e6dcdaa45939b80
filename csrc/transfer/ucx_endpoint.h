// An endpoint of UCP, from its creation to the end of its close.
//
// Not ucxx's: its forced close leaves outstanding gets of a peer that stands still where they are
// (measured with ucxx 0.52), and with them the memory that they write to.
#pragma once

#include <ucp/api/ucp.h>

#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

namespace loraserve {

class UcxEndpoint {
 public:
  // `address`: as UCX packed it. kFailedPrecondition where no transport leads there.
  static Result<std::unique_ptr<UcxEndpoint>> Connect(ucp_worker_h worker,
                                                      std::string_view address);
  // REQUIRES closed(), or the end of the process.
  ~UcxEndpoint() = default;
  UcxEndpoint(const UcxEndpoint&) = delete;
  UcxEndpoint& operator=(const UcxEndpoint&) = delete;

  // Null once it is closed.
  ucp_ep_h handle() const { return handle_; }
  // UCX has found that the peer is gone: close it.
  bool failed() const { return failed_; }
  // By force: outstanding operations end, with an error, as the worker progresses. Not from inside
  // a callback of UCX. Once.
  void Close();
  // Nothing of it is left in UCX.
  bool closed();
  // One-sided transports that it goes over, comma separated; empty where UCX does not say.
  std::string transports() const;

 private:
  UcxEndpoint() = default;
  ucp_ep_h handle_ = nullptr;
  ucs_status_ptr_t close_ = nullptr;
  bool failed_ = false;
};

}  // namespace loraserve
