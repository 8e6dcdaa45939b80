// The loop of loraserve-transfer: one thread that sleeps in poll until the node, UCX or the time
// has something for it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "base/status.h"
#include "transfer/host_pool.h"
#include "transfer/messages.h"
#include "transfer/remote_read.h"
#include "transfer/ucx_transport.h"

namespace loraserve {

// How many reads run at a time; more are refused.
constexpr size_t kMaxReads = 64;
// How many parts of the pool are exported at a time.
constexpr size_t kMaxExports = 64 << 10;

class Sidecar {
 public:
  // Of the process: `kOk` after the node's end of the socket closed.
  enum class End { kOk, kBadFrame, kSocket, kStuck };

  // `socket`: a connected Unix stream socket, of this object from now on. `make_transport` is
  // called once the pool is there.
  Sidecar(int socket, std::function<Result<std::unique_ptr<UcxTransport>>()> make_transport);
  ~Sidecar();
  Sidecar(const Sidecar&) = delete;
  Sidecar& operator=(const Sidecar&) = delete;

  // Until the node closes its end, sends what is no frame, or a read cannot be ended.
  End Run();

 private:
  struct Running {
    std::unique_ptr<RemoteRead> read;
    size_t scratch;
    uint64_t told;  // bytes, in the last Progress
  };
  bool Receive();
  bool Send();
  void Dispatch(RequestFrame frame);
  void OnHello(uint64_t id, const Hello& hello);
  void OnExport(uint64_t id, const ExportRequest& request);
  void OnRead(uint64_t id, ReadRequest request);
  void AdvanceReads(double now_s);
  int SleepMs(double now_s);
  void Answer(uint64_t id, const loraserve::Answer& answer);
  void Refuse(uint64_t id, const Status& status);

  const int socket_;
  const std::function<Result<std::unique_ptr<UcxTransport>>()> make_transport_;
  int pool_fd_ = -1;  // received, not yet mapped
  std::string in_;
  std::string out_;
  std::unique_ptr<HostPool> pool_;
  uint8_t* scratch_ = nullptr;
  std::vector<size_t> free_scratch_;
  std::unique_ptr<UcxTransport> transport_;
  std::map<uint64_t, size_t> exports_;  // offset to length
  std::map<uint64_t, Running> reads_;
  bool populating_ = false;
  bool closed_ = false;  // by the node
  bool stuck_ = false;
  Status bad_frame_;
};

}  // namespace loraserve
