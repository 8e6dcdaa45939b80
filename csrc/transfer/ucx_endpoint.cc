#include "transfer/ucx_endpoint.h"

#include <set>
#include <vector>

#include "base/check.h"
#include "transfer/ucx_resources.h"

namespace loraserve {

Result<std::unique_ptr<UcxEndpoint>> UcxEndpoint::Connect(ucp_worker_h worker,
                                                          std::string_view address) {
  std::unique_ptr<UcxEndpoint> made(new UcxEndpoint());
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.data());
  // Without it a peer that dies takes this process with it, or leaves it hanging.
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = [](void* endpoint, ucp_ep_h, ucs_status_t) {
    static_cast<UcxEndpoint*>(endpoint)->failed_ = true;
  };
  params.err_handler.arg = made.get();
  if (const ucs_status_t status = ucp_ep_create(worker, &params, &made->handle_);
      status != UCS_OK) {
    return Status(StatusCode::kFailedPrecondition,
                  std::string("worker_address: no transport that is allowed here reaches it: ") +
                      ucs_status_string(status));
  }
  return made;
}

void UcxEndpoint::Close() {
  LS_CHECK(handle_ != nullptr);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  close_ = ucp_ep_close_nbx(handle_, &param);
  handle_ = nullptr;
}

bool UcxEndpoint::closed() {
  if (handle_ != nullptr) {
    return false;
  }
  if (UCS_PTR_IS_PTR(close_)) {
    if (ucp_request_check_status(close_) == UCS_INPROGRESS) {
      return false;
    }
    ucp_request_free(close_);
    close_ = nullptr;
  }
  return true;
}

std::string UcxEndpoint::transports() const {
  if (handle_ == nullptr) {
    return "";
  }
  std::vector<ucp_transport_entry_t> entries(16, ucp_transport_entry_t{});
  ucp_ep_attr_t attributes{};
  attributes.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS;
  attributes.transports.entries = entries.data();
  attributes.transports.num_entries = static_cast<unsigned>(entries.size());
  attributes.transports.entry_size = sizeof(ucp_transport_entry_t);
  if (ucp_ep_query(handle_, &attributes) != UCS_OK) {
    return "";
  }
  std::set<std::string> names;
  for (unsigned i = 0; i < attributes.transports.num_entries && i < entries.size(); ++i) {
    // UCX 1.13 leaves the names empty.
    if (entries[i].transport_name != nullptr && OneSided(entries[i].transport_name)) {
      names.insert(entries[i].transport_name);
    }
  }
  return JoinedNames(names);
}

}  // namespace loraserve
