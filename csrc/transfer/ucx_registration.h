// Memory that UCP has registered, for as long as the object lives.
#pragma once

#include <ucp/api/ucp.h>

#include <memory>

#include "base/status.h"

namespace loraserve {

class UcxRegistration {
 public:
  // `prot`: UCP_MEM_MAP_PROT_*. kResourceExhausted.
  static Result<std::unique_ptr<UcxRegistration>> Make(
      ucp_context_h context, void* memory, size_t bytes, unsigned prot,
      ucs_memory_type_t type = UCS_MEMORY_TYPE_HOST);
  ~UcxRegistration() { ucp_mem_unmap(context_, handle_); }
  UcxRegistration(const UcxRegistration&) = delete;
  UcxRegistration& operator=(const UcxRegistration&) = delete;
  ucp_mem_h handle() const { return handle_; }
  // The key that a peer reads it by.
  Result<std::string> PackedKey() const;

 private:
  UcxRegistration(ucp_context_h context, ucp_mem_h handle) : context_(context), handle_(handle) {}
  const ucp_context_h context_;
  const ucp_mem_h handle_;
};

}  // namespace loraserve
