#include "transfer/ucx_transport.h"

#include <ucp/api/ucp.h>
#include <ucxx/api.h>

#include <algorithm>
#include <exception>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "transfer/envelope.h"
#include "transfer/ucx_endpoint.h"
#include "transfer/ucx_registration.h"
#include "transfer/ucx_resources.h"

namespace loraserve {
namespace {

// Endpoints that are kept without anybody reading over them.
constexpr size_t kMaxIdlePeers = 64;
constexpr double kProgressSeconds = 0.002;

std::string VersionOfLibrary() {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned patch = 0;
  ucp_get_version(&major, &minor, &patch);
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
}

// An endpoint and who uses it. Owned by the transport until its close has ended.
struct Peer {
  std::string address;  // unwrapped: the key of the cache
  std::unique_ptr<UcxEndpoint> endpoint;
  size_t memories = 0;
  bool broken = false;  // closed by force for a reader's sake
  bool failed = false;  // closes next, outside UCX's callbacks

  bool usable() const { return !failed && endpoint->handle() != nullptr && !endpoint->failed(); }
  double used_s = 0;
};

struct Local {
  uint8_t* begin;
  size_t bytes;
  ucs_memory_type_t type;
  std::unique_ptr<UcxRegistration> registration;
};

struct Exported {
  size_t bytes;
  std::unique_ptr<UcxRegistration> registration;
  std::string rkey;
};

class Ucx;

// User data of a get. Deleted by its callback.
struct PendingGet {
  Ucx* ucx;
  std::shared_ptr<Peer> peer;
  GetDone done;
};

struct Completion {
  GetDone done;
  GetOutcome outcome;
  std::string why;
};

class UcxMemory : public RemoteMemory {
 public:
  UcxMemory(Ucx* ucx, std::shared_ptr<Peer> peer, ucp_rkey_h rkey)
      : ucx_(ucx), peer_(std::move(peer)), rkey_(rkey) {
    ++peer_->memories;
  }
  ~UcxMemory() override {
    ucp_rkey_destroy(rkey_);
    --peer_->memories;
  }
  UcxMemory(const UcxMemory&) = delete;
  UcxMemory& operator=(const UcxMemory&) = delete;

  void Get(uint64_t address, void* into, size_t bytes, GetDone done) override;
  std::string transports() const override;
  void Break() override;

 private:
  Ucx* const ucx_;
  const std::shared_ptr<Peer> peer_;
  const ucp_rkey_h rkey_;
};

class Ucx : public UcxTransport {
 public:
  Ucx(std::shared_ptr<ucxx::Context> context, std::shared_ptr<ucxx::Worker> worker, int event_fd,
      std::string transports)
      : context_(std::move(context)),
        worker_(std::move(worker)),
        event_fd_(event_fd),
        transports_(std::move(transports)) {
    const std::shared_ptr<ucxx::Address> address = worker_->addressBuilder().build();
    worker_address_ = WrapBlob(BlobKind::kWorkerAddress, address->getStringView());
  }
  ~Ucx() override {
    // Nothing is read any more.
    while (!peers_.empty()) {
      BreakPeer(std::shared_ptr<Peer>(peers_.begin()->second));
    }
    const double until_s = MonotonicSeconds() + 1.0;
    while (!closing_.empty() && MonotonicSeconds() < until_s) {
      Progress();
    }
  }
  Ucx(const Ucx&) = delete;
  Ucx& operator=(const Ucx&) = delete;

  std::string ucx_version() const override { return VersionOfLibrary(); }
  std::string transports() const override { return transports_; }
  std::string worker_address() const override { return worker_address_; }
  int event_fd() const override { return event_fd_; }

  Status RegisterLocal(void* memory, size_t bytes, MemoryKind kind) override {
    const ucs_memory_type_t type =
        kind == MemoryKind::kCuda ? UCS_MEMORY_TYPE_CUDA : UCS_MEMORY_TYPE_HOST;
    auto made =
        UcxRegistration::Make(context_->getHandle(), memory, bytes,
                              UCP_MEM_MAP_PROT_LOCAL_READ | UCP_MEM_MAP_PROT_LOCAL_WRITE, type);
    if (!made.ok()) {
      return made.status();
    }
    locals_.push_back({static_cast<uint8_t*>(memory), bytes, type, std::move(made.value())});
    return {};
  }

  Result<ExportedMemory> Export(void* memory, size_t bytes) override {
    if (const auto found = exports_.find(memory); found != exports_.end()) {
      if (found->second.bytes != bytes) {
        return Status(StatusCode::kAlreadyExists,
                      "offset: is exported with " + std::to_string(found->second.bytes) + " bytes");
      }
      return ExportedMemory{reinterpret_cast<uint64_t>(memory), found->second.rkey};
    }
    auto made = UcxRegistration::Make(context_->getHandle(), memory, bytes,
                                      UCP_MEM_MAP_PROT_LOCAL_READ | UCP_MEM_MAP_PROT_REMOTE_READ);
    if (!made.ok()) {
      return made.status();
    }
    auto key = made.value()->PackedKey();
    if (!key.ok()) {
      return key.status();
    }
    if (key.value().size() > kMaxBlobBytes) {
      return Status(StatusCode::kFailedPrecondition, "rkey: too long");
    }
    std::string rkey = WrapBlob(BlobKind::kRemoteKey, key.value());
    exports_[memory] = {bytes, std::move(made.value()), rkey};
    return ExportedMemory{reinterpret_cast<uint64_t>(memory), std::move(rkey)};
  }

  void Withdraw(void* memory) override { exports_.erase(memory); }

  Result<std::shared_ptr<RemoteMemory>> Open(std::string_view worker_address,
                                             std::string_view rkey) override {
    const auto address = UnwrapBlob(BlobKind::kWorkerAddress, worker_address);
    if (!address.ok()) {
      return address.status();
    }
    const auto key = UnwrapBlob(BlobKind::kRemoteKey, rkey);
    if (!key.ok()) {
      return key.status();
    }
    auto peer = FindPeer(std::string(address.value()));
    if (!peer.ok()) {
      return peer.status();
    }
    ucp_rkey_h unpacked = nullptr;
    const ucs_status_t status =
        ucp_ep_rkey_unpack(peer.value()->endpoint->handle(), key.value().data(), &unpacked);
    if (status != UCS_OK) {
      return Status(StatusCode::kFailedPrecondition,
                    std::string("rkey: UCX does not take it: ") + ucs_status_string(status));
    }
    return std::shared_ptr<RemoteMemory>(
        std::make_shared<UcxMemory>(this, std::move(peer.value()), unpacked));
  }

  bool Progress() override {
    const double until_s = MonotonicSeconds() + kProgressSeconds;
    bool more = true;
    while (more && MonotonicSeconds() < until_s) {
      more = ucp_worker_progress(worker_->getHandle()) != 0;
    }
    while (!failed_.empty()) {
      const std::shared_ptr<Peer> peer = std::move(failed_.back());
      failed_.pop_back();
      BreakPeer(peer);
    }
    std::erase_if(closing_, [](const std::shared_ptr<Peer>& peer) {
      return peer->endpoint->closed() && peer->memories == 0;
    });
    std::vector<Completion> completed;
    completed.swap(completed_);
    for (Completion& completion : completed) {
      completion.done(completion.outcome, completion.why);
    }
    return more || !completed.empty() || !completed_.empty();
  }

  int SleepMs() override {
    if (!completed_.empty() || !failed_.empty() ||
        ucp_worker_arm(worker_->getHandle()) == UCS_ERR_BUSY) {
      return 0;
    }
    // A close goes on in calls of progress alone; no event says so.
    return closing_.empty() ? -1 : 1;
  }

  void Get(const std::shared_ptr<Peer>& peer, ucp_rkey_h rkey, uint64_t address, void* into,
           size_t bytes, GetDone done) {
    if (!peer->usable()) {
      completed_.push_back({std::move(done), Outcome(*peer), "the endpoint is closed"});
      return;
    }
    peer->used_s = MonotonicSeconds();
    // The callback's own from here on, which comes unless the call ends the get itself.
    auto* const pending = new PendingGet{this, peer, std::move(done)};
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.user_data = pending;
    param.cb.send = [](void* request, ucs_status_t status, void* user) {
      ucp_request_free(request);
      const std::unique_ptr<PendingGet> ended(static_cast<PendingGet*>(user));
      ended->ucx->OnGetEnded(*ended, status);
    };
    for (const Local& local : locals_) {
      auto* const begin = static_cast<uint8_t*>(into);
      if (begin >= local.begin && begin + bytes <= local.begin + local.bytes) {
        param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
        param.memh = local.registration->handle();
        param.memory_type = local.type;
      }
    }
    const ucs_status_ptr_t request =
        ucp_get_nbx(peer->endpoint->handle(), into, bytes, address, rkey, &param);
    if (!UCS_PTR_IS_PTR(request)) {
      const std::unique_ptr<PendingGet> ended(pending);
      OnGetEnded(*ended, UCS_PTR_STATUS(request));
    }
  }

  void BreakPeer(const std::shared_ptr<Peer>& peer) {
    const auto found = peers_.find(peer->address);
    if (found != peers_.end() && found->second == peer) {
      peers_.erase(found);
    }
    if (peer->endpoint->handle() != nullptr) {
      peer->endpoint->Close();
      closing_.push_back(peer);
    }
  }

 private:
  static GetOutcome Outcome(const Peer& peer) {
    return peer.broken ? GetOutcome::kBroken : GetOutcome::kFailed;
  }

  void OnGetEnded(PendingGet& get, ucs_status_t status) {
    if (status == UCS_OK) {
      completed_.push_back({std::move(get.done), GetOutcome::kDone, ""});
      return;
    }
    completed_.push_back({std::move(get.done), Outcome(*get.peer), ucs_status_string(status)});
    // An endpoint with an error is of no more use.
    if (get.peer->endpoint->handle() != nullptr && !get.peer->failed) {
      get.peer->failed = true;
      failed_.push_back(get.peer);
    }
  }

  Result<std::shared_ptr<Peer>> FindPeer(std::string address) {
    if (const auto found = peers_.find(address); found != peers_.end()) {
      const std::shared_ptr<Peer> peer = found->second;
      if (peer->usable()) {
        peer->used_s = MonotonicSeconds();
        return peer;
      }
      BreakPeer(peer);
    }
    MakeRoom();
    auto endpoint = UcxEndpoint::Connect(worker_->getHandle(), address);
    if (!endpoint.ok()) {
      return endpoint.status();
    }
    auto peer = std::make_shared<Peer>();
    peer->endpoint = std::move(endpoint.value());
    peer->address = std::move(address);
    peer->used_s = MonotonicSeconds();
    peers_[peer->address] = peer;
    return peer;
  }

  void MakeRoom() {
    while (peers_.size() >= kMaxIdlePeers) {
      const auto oldest =
          std::min_element(peers_.begin(), peers_.end(), [](const auto& left, const auto& right) {
            return std::pair(left.second->memories > 0, left.second->used_s) <
                   std::pair(right.second->memories > 0, right.second->used_s);
          });
      if (oldest->second->memories > 0) {
        return;  // all are in use
      }
      BreakPeer(std::shared_ptr<Peer>(oldest->second));
    }
  }

  // In the order that they may go: last first.
  const std::shared_ptr<ucxx::Context> context_;
  const std::shared_ptr<ucxx::Worker> worker_;
  const int event_fd_;
  const std::string transports_;
  std::string worker_address_;
  std::vector<Local> locals_;
  std::map<void*, Exported> exports_;
  std::map<std::string, std::shared_ptr<Peer>> peers_;
  std::vector<std::shared_ptr<Peer>> closing_;
  std::vector<std::shared_ptr<Peer>> failed_;
  std::vector<Completion> completed_;
};

void UcxMemory::Get(uint64_t address, void* into, size_t bytes, GetDone done) {
  ucx_->Get(peer_, rkey_, address, into, bytes, std::move(done));
}

std::string UcxMemory::transports() const { return peer_->endpoint->transports(); }

void UcxMemory::Break() {
  peer_->broken = true;
  ucx_->BreakPeer(peer_);
}

}  // namespace

Result<std::unique_ptr<UcxTransport>> UcxTransport::Create(const UcxSettings& settings) {
  const auto unable = [](const std::string& why) {
    return Status(StatusCode::kFailedPrecondition, "ucx: " + why);
  };
  try {
    std::shared_ptr<ucxx::Context> context =
        ucxx::contextBuilder(UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP)
            .configMap({{"TLS", settings.transports}})
            .build();
    std::set<std::string> names = UcxResourceNames(context->getHandle());
    for (const std::string& name : names) {
      if (!AllowedByList(settings.transports, name)) {
        return unable("offers " + name + ", which is not allowed");
      }
    }
    std::erase_if(names, [](const std::string& name) { return !OneSided(name); });
    std::shared_ptr<ucxx::Worker> worker = context->workerBuilder().build();
    int event_fd = -1;
    const ucs_status_t status = ucp_worker_get_efd(worker->getHandle(), &event_fd);
    if (status != UCS_OK) {
      return unable(std::string("has no event descriptor: ") + ucs_status_string(status));
    }
    return std::unique_ptr<UcxTransport>(
        std::make_unique<Ucx>(std::move(context), std::move(worker), event_fd, JoinedNames(names)));
  } catch (const std::exception& error) {
    return unable(VersionOfLibrary() + " offers none of " + settings.transports + ": " +
                  error.what());
  }
}

}  // namespace loraserve
