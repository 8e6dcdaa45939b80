#include "transfer/sidecar.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "transfer/host_identity.h"

namespace loraserve {
namespace {

constexpr size_t kReceiveBytes = 64 << 10;
// Where the node reads no answers, its requests wait too.
constexpr size_t kMaxOutBytes = 1 << 20;
constexpr size_t kScratchBytes = 2 * kSlotHeaderBytes;
constexpr size_t kScratchAll = kMaxReads * kScratchBytes;

}  // namespace

Sidecar::Sidecar(int socket, std::function<Result<std::unique_ptr<UcxTransport>>()> make_transport)
    : socket_(socket), make_transport_(std::move(make_transport)) {
  for (size_t i = kMaxReads; i-- > 0;) {
    free_scratch_.push_back(i);
  }
}

Sidecar::~Sidecar() {
  // Before the memory that they read into.
  reads_.clear();
  transport_.reset();
  if (scratch_ != nullptr) {
    munmap(scratch_, kScratchAll);
  }
  if (pool_fd_ >= 0) {
    close(pool_fd_);
  }
  close(socket_);
}

Sidecar::End Sidecar::Run() {
  while (true) {
    if (!Send()) {
      return End::kSocket;
    }
    if (out_.size() < kMaxOutBytes && !Receive()) {
      return closed_ ? End::kOk : End::kSocket;
    }
    while (bad_frame_.ok()) {
      Result<std::optional<RequestFrame>> taken = TakeRequest(&in_);
      if (!taken.ok()) {
        bad_frame_ = taken.status();
      } else if (taken.value()) {
        Dispatch(*std::move(taken.value()));
      } else {
        break;
      }
    }
    if (!bad_frame_.ok()) {
      std::fprintf(stderr, "loraserve-transfer: %s\n", bad_frame_.message().c_str());
      return End::kBadFrame;
    }
    if (closed_) {
      return End::kOk;
    }
    const bool busy = transport_ && transport_->Progress();
    AdvanceReads(MonotonicSeconds());
    if (stuck_) {
      return End::kStuck;
    }
    if (populating_ && reads_.empty()) {
      populating_ = pool_->PopulateSome();
    }
    std::array<pollfd, 2> waits = {{{socket_, 0, 0}, {-1, POLLIN, 0}}};
    waits[0].events = static_cast<int16_t>((out_.size() < kMaxOutBytes ? POLLIN : 0) |
                                           (out_.empty() ? 0 : POLLOUT));
    if (transport_) {
      waits[1].fd = transport_->event_fd();
    }
    const int sleep_ms = busy || populating_ ? 0 : SleepMs(MonotonicSeconds());
    if (poll(waits.data(), waits.size(), sleep_ms) < 0 && errno != EINTR) {
      return End::kSocket;
    }
  }
}

int Sidecar::SleepMs(double now_s) {
  double next_s = INFINITY;
  for (const auto& [id, running] : reads_) {
    next_s = std::min(next_s, running.read->next_s());
  }
  // Rounded up, so that it is over then.
  const int own_ms =
      next_s == INFINITY
          ? -1
          : static_cast<int>(std::clamp(std::ceil((next_s - now_s) * 1e3), 0.0, 60e3));
  const int transport_ms = transport_ ? transport_->SleepMs() : -1;
  if (own_ms < 0 || transport_ms < 0) {
    return std::max(own_ms, transport_ms);
  }
  return std::min(own_ms, transport_ms);
}

bool Sidecar::Receive() {
  std::array<char, kReceiveBytes> bytes;
  iovec part{bytes.data(), bytes.size()};
  // Room for one descriptor; the kernel closes what does not fit.
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control;
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t got = recvmsg(socket_, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0) {
    closed_ = errno == ECONNRESET;
    return errno == EAGAIN || errno == EINTR;
  }
  for (cmsghdr* head = CMSG_FIRSTHDR(&message); head != nullptr;
       head = CMSG_NXTHDR(&message, head)) {
    if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    int given = -1;
    std::memcpy(&given, CMSG_DATA(head), sizeof(given));
    if (pool_ || pool_fd_ >= 0) {
      close(given);
      bad_frame_ = {StatusCode::kInvalidArgument, "frame: a second descriptor"};
    } else {
      pool_fd_ = given;
    }
  }
  if (got == 0) {
    closed_ = true;
    return true;
  }
  in_.append(bytes.data(), static_cast<size_t>(got));
  return true;
}

bool Sidecar::Send() {
  while (!out_.empty()) {
    const ssize_t sent = send(socket_, out_.data(), out_.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EPIPE || errno == ECONNRESET) {
        out_.clear();  // the end of the socket is found by Receive
        return true;
      }
      return errno == EAGAIN || errno == EINTR;
    }
    out_.erase(0, static_cast<size_t>(sent));
  }
  return true;
}

void Sidecar::Answer(uint64_t id, const loraserve::Answer& answer) {
  out_ += EncodeAnswer(id, answer);
}

void Sidecar::Refuse(uint64_t id, const Status& status) {
  Answer(id, Failed{.code = status.code(), .message = status.message()});
}

void Sidecar::Dispatch(RequestFrame frame) {
  const auto bad = [this](const char* what) {
    bad_frame_ = {StatusCode::kInvalidArgument, std::string("frame: ") + what};
  };
  if (const auto* hello = std::get_if<Hello>(&frame.request)) {
    if (pool_) {
      bad("a second hello");
    } else {
      OnHello(frame.id, *hello);
    }
    return;
  }
  if (!transport_) {
    bad("a request before the pool is there");
    return;
  }
  if (const auto* request = std::get_if<ExportRequest>(&frame.request)) {
    OnExport(frame.id, *request);
  } else if (const auto* request = std::get_if<WithdrawRequest>(&frame.request)) {
    if (exports_.erase(request->offset) > 0) {
      transport_->Withdraw(pool_->data() + request->offset);
    }
    Answer(frame.id, Ended{});
  } else if (auto* request = std::get_if<ReadRequest>(&frame.request)) {
    OnRead(frame.id, std::move(*request));
  } else if (std::get_if<CancelRequest>(&frame.request) != nullptr) {
    if (const auto found = reads_.find(frame.id); found != reads_.end()) {
      found->second.read->Cancel(MonotonicSeconds());
    }
  } else {
    Answer(frame.id, Ended{});
  }
}

void Sidecar::OnHello(uint64_t id, const Hello& hello) {
  if (pool_fd_ < 0) {
    bad_frame_ = {StatusCode::kInvalidArgument, "frame: no descriptor came with the hello"};
    return;
  }
  auto pool = HostPool::Map(std::exchange(pool_fd_, -1), hello.capacity_bytes);
  if (!pool.ok()) {
    Refuse(id, pool.status());
    return;
  }
  if (scratch_ == nullptr) {
    void* scratch =
        mmap(nullptr, kScratchAll, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    LS_CHECK(scratch != MAP_FAILED);
    scratch_ = static_cast<uint8_t*>(scratch);
  }
  auto transport = make_transport_();
  if (!transport.ok()) {
    Refuse(id, transport.status());
    return;
  }
  Status status = transport.value()->RegisterLocal(scratch_, kScratchAll);
  if (status.ok()) {
    status = transport.value()->RegisterLocal(pool.value()->data(), hello.capacity_bytes);
  }
  if (!status.ok()) {
    Refuse(id, {StatusCode::kFailedPrecondition, status.message()});
    return;
  }
  pool_ = std::move(pool.value());
  transport_ = std::move(transport.value());
  populating_ = true;
  Answer(id, Ready{.ucx_version = transport_->ucx_version(),
                   .host = HostIdentity(),
                   .transports = transport_->transports(),
                   .worker_address = transport_->worker_address()});
}

void Sidecar::OnExport(uint64_t id, const ExportRequest& request) {
  if (request.length == 0 || !pool_->Holds(request.offset, request.length)) {
    Refuse(id, {StatusCode::kInvalidArgument, "offset: " + std::to_string(request.length) +
                                                  " bytes at " + std::to_string(request.offset) +
                                                  " of a pool of " +
                                                  std::to_string(pool_->capacity_bytes())});
    return;
  }
  if (exports_.size() >= kMaxExports) {
    Refuse(id, {StatusCode::kResourceExhausted,
                "exports: " + std::to_string(kMaxExports) + " are there"});
    return;
  }
  auto exported = transport_->Export(pool_->data() + request.offset, request.length);
  if (!exported.ok()) {
    Refuse(id, exported.status());
    return;
  }
  exports_[request.offset] = request.length;
  Answer(id, Exported{.address = exported.value().address, .rkey = exported.value().rkey});
}

void Sidecar::OnRead(uint64_t id, ReadRequest request) {
  Status status = CheckReadRequest(request, pool_->capacity_bytes());
  if (status.ok() && reads_.contains(id)) {
    status = {StatusCode::kAlreadyExists, "read: this id is running"};
  }
  if (status.ok() && free_scratch_.empty()) {
    status = {StatusCode::kResourceExhausted,
              "reads: " + std::to_string(kMaxReads) + " are running"};
  }
  if (!status.ok()) {
    Refuse(id, status);
    return;
  }
  const size_t scratch = free_scratch_.back();
  free_scratch_.pop_back();
  uint8_t* into = pool_->data() + request.local_offset;
  reads_[id] = {.read = std::make_unique<RemoteRead>(std::move(request), into,
                                                     scratch_ + scratch * kScratchBytes,
                                                     transport_.get(), MonotonicSeconds()),
                .scratch = scratch,
                .told = 0};
}

void Sidecar::AdvanceReads(double now_s) {
  for (auto at = reads_.begin(); at != reads_.end();) {
    auto& [id, running] = *at;
    RemoteRead& read = *running.read;
    read.Advance(now_s);
    stuck_ = stuck_ || read.Stuck(now_s);
    if (read.arrived() > running.told && out_.size() < kMaxOutBytes) {
      running.told = read.arrived();
      Answer(id, Progress{.bytes = running.told});
    }
    if (!read.ended()) {
      ++at;
      continue;
    }
    if (read.ended()->ok()) {
      Answer(id, Ended{.transports = read.transports()});
    } else {
      Refuse(id, *read.ended());
    }
    free_scratch_.push_back(running.scratch);
    at = reads_.erase(at);
  }
}

}  // namespace loraserve
