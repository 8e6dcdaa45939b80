// The messages between a node and its sidecar, over a Unix stream socket.
//
// A frame is a head of 16 bytes (magic, version, type, length of the body, request id; all little
// endian) and the body. A request's id is the node's; every answer to it carries the same. Neither
// side trusts the other: a frame that is not exactly one of these is an error, and the connection
// ends. loraserve/node/transfer/messages.py is the other side.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>

#include "base/status.h"

namespace loraserve {

constexpr uint16_t kFrameMagic = 0x4c54;
constexpr uint8_t kProtocolVersion = 1;
constexpr size_t kFrameHeadBytes = 16;
constexpr size_t kMaxBodyBytes = 64 << 10;

// Node to sidecar. The first message, once; one descriptor travels with it, of the host pool.
struct Hello {
  uint64_t capacity_bytes;
};
// Registers a part of the pool for peers to read. Answered by Exported.
struct ExportRequest {
  uint64_t offset;
  uint64_t length;
};
// Unregisters it. Answered by Ended, also where nothing is exported there.
struct WithdrawRequest {
  uint64_t offset;
};
// Answered by Progress, any number of times, and one Ended or Failed; nothing is written to the
// pool after that.
struct ReadRequest {
  uint64_t address;            // of the slot header in the exporter's address space
  uint64_t generation;         // the slot header must say so, before and after
  uint64_t size_bytes;         // of the packed bytes; the slot header must say so
  uint64_t skip_bytes;         // of the packed bytes, not read
  uint64_t local_offset;       // in the pool, where packed byte `skip_bytes` goes
  uint64_t timeout_us;         // from now
  uint32_t header_bytes;       // from `address` to the packed bytes
  std::string worker_address;  // wrapped (envelope.h)
  std::string rkey;            // wrapped
};
// Ends the read that has this frame's id soon; its answer still comes. Not answered itself.
struct CancelRequest {};
// Answered by Ended.
struct PingRequest {};

using Request =
    std::variant<Hello, ExportRequest, WithdrawRequest, ReadRequest, CancelRequest, PingRequest>;

// Sidecar to node. The answer to Hello.
struct Ready {
  std::string ucx_version;     // major.minor.patch
  std::string host;            // host_identity.h
  std::string transports;      // of UCX, comma separated; those that read one-sided
  std::string worker_address;  // wrapped
};
struct Exported {
  uint64_t address;
  std::string rkey;  // wrapped
};
struct Progress {
  uint64_t bytes;  // that have arrived, without a gap, from the start of what is read
};
struct Ended {
  std::string transports;  // that a read's endpoint went over, comma separated; may be empty
};
struct Failed {
  StatusCode code;
  std::string message;  // cut at kMaxMessageBytes
};

constexpr size_t kMaxMessageBytes = 1 << 10;

using Answer = std::variant<Ready, Exported, Progress, Ended, Failed>;

struct RequestFrame {
  uint64_t id;
  Request request;
};

// The first frame of `buffer`, which is taken from its front; nothing where it is not whole yet;
// kInvalidArgument where it is none.
Result<std::optional<RequestFrame>> TakeRequest(std::string* buffer);

// One whole frame.
std::string EncodeAnswer(uint64_t id, const Answer& answer);

}  // namespace loraserve
