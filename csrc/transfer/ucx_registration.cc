#include "transfer/ucx_registration.h"

namespace loraserve {

Result<std::unique_ptr<UcxRegistration>> UcxRegistration::Make(ucp_context_h context, void* memory,
                                                               size_t bytes, unsigned prot,
                                                               ucs_memory_type_t type) {
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH |
                      UCP_MEM_MAP_PARAM_FIELD_PROT | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.address = memory;
  params.length = bytes;
  params.prot = prot;
  params.memory_type = type;
  ucp_mem_h handle = nullptr;
  if (const ucs_status_t status = ucp_mem_map(context, &params, &handle); status != UCS_OK) {
    return Status(
        StatusCode::kResourceExhausted,
        "memory: " + std::to_string(bytes) +
            " bytes cannot be registered: " + ucs_status_string(status) +
            (type == UCS_MEMORY_TYPE_HOST
                 ? " (RDMA needs an unlimited `ulimit -l`)"
                 : " (device memory: needs nvidia_peermem or dma-buf, and a UCX with CUDA)"));
  }
  return std::unique_ptr<UcxRegistration>(new UcxRegistration(context, handle));
}

Result<std::string> UcxRegistration::PackedKey() const {
  void* packed = nullptr;
  size_t size = 0;
  if (const ucs_status_t status = ucp_rkey_pack(context_, handle_, &packed, &size);
      status != UCS_OK) {
    return Status(StatusCode::kFailedPrecondition,
                  std::string("rkey: ") + ucs_status_string(status));
  }
  std::string key(static_cast<const char*>(packed), size);
  ucp_rkey_buffer_release(packed);
  return key;
}

}  // namespace loraserve
