#include "transfer/messages.h"

#include <type_traits>

#include "transfer/envelope.h"
#include "transfer/wire.h"

namespace loraserve {
namespace {

// What a wrapped blob takes at most.
constexpr size_t kMaxWrappedBytes = kMaxBlobBytes + 16;

enum class Type : uint8_t {
  kHello = 1,
  kExport = 2,
  kWithdraw = 3,
  kRead = 4,
  kCancel = 5,
  kPing = 6,
  kReady = 64,
  kExported = 65,
  kProgress = 66,
  kEnded = 67,
  kFailed = 68,
};

Status Wrong(const std::string& what) { return {StatusCode::kInvalidArgument, what}; }

std::optional<Request> DecodeBody(uint8_t type, WireReader& in) {
  switch (static_cast<Type>(type)) {
    case Type::kHello:
      return Hello{.capacity_bytes = in.U64()};
    case Type::kExport: {
      ExportRequest request{};
      request.offset = in.U64();
      request.length = in.U64();
      return request;
    }
    case Type::kWithdraw:
      return WithdrawRequest{.offset = in.U64()};
    case Type::kRead: {
      ReadRequest request{};
      request.address = in.U64();
      request.generation = in.U64();
      request.size_bytes = in.U64();
      request.skip_bytes = in.U64();
      request.local_offset = in.U64();
      request.timeout_us = in.U64();
      request.header_bytes = in.U32();
      request.worker_address = in.Bytes(kMaxWrappedBytes);
      request.rkey = in.Bytes(kMaxWrappedBytes);
      return request;
    }
    case Type::kCancel:
      return CancelRequest{};
    case Type::kPing:
      return PingRequest{};
    default:
      return std::nullopt;
  }
}

}  // namespace

Result<std::optional<RequestFrame>> TakeRequest(std::string* buffer) {
  if (buffer->size() < kFrameHeadBytes) {
    return std::optional<RequestFrame>();
  }
  WireReader head(std::string_view(*buffer).substr(0, kFrameHeadBytes));
  const uint16_t magic = head.U16();
  const uint8_t version = head.U8();
  const uint8_t type = head.U8();
  const uint32_t size = head.U32();
  const uint64_t id = head.U64();
  if (magic != kFrameMagic) {
    return Wrong("frame: wrong magic");
  }
  if (version != kProtocolVersion) {
    return Wrong("frame: version " + std::to_string(version) + ", this side speaks " +
                 std::to_string(kProtocolVersion));
  }
  if (size > kMaxBodyBytes) {
    return Wrong("frame: body of " + std::to_string(size) + " bytes");
  }
  if (buffer->size() < kFrameHeadBytes + size) {
    return std::optional<RequestFrame>();
  }
  WireReader body(std::string_view(*buffer).substr(kFrameHeadBytes, size));
  std::optional<Request> request = DecodeBody(type, body);
  if (!request) {
    return Wrong("frame: unknown type " + std::to_string(type));
  }
  if (!body.Ended()) {
    return Wrong("frame: body of type " + std::to_string(type) + " has a wrong length");
  }
  buffer->erase(0, kFrameHeadBytes + size);
  return std::optional<RequestFrame>({id, *std::move(request)});
}

std::string EncodeAnswer(uint64_t id, const Answer& answer) {
  WireWriter body;
  const Type type = std::visit(
      [&](const auto& message) {
        using T = std::decay_t<decltype(message)>;
        if constexpr (std::is_same_v<T, Ready>) {
          body.Bytes(message.ucx_version);
          body.Bytes(message.host);
          body.Bytes(message.transports);
          body.Bytes(message.worker_address);
          return Type::kReady;
        } else if constexpr (std::is_same_v<T, Exported>) {
          body.U64(message.address);
          body.Bytes(message.rkey);
          return Type::kExported;
        } else if constexpr (std::is_same_v<T, Progress>) {
          body.U64(message.bytes);
          return Type::kProgress;
        } else if constexpr (std::is_same_v<T, Ended>) {
          body.Bytes(message.transports);
          return Type::kEnded;
        } else {
          body.U32(static_cast<uint32_t>(message.code));
          body.Bytes(std::string_view(message.message).substr(0, kMaxMessageBytes));
          return Type::kFailed;
        }
      },
      answer);
  const std::string bytes = body.Take();
  WireWriter frame;
  frame.U16(kFrameMagic);
  frame.U8(kProtocolVersion);
  frame.U8(static_cast<uint8_t>(type));
  frame.U32(static_cast<uint32_t>(bytes.size()));
  frame.U64(id);
  return frame.Take() + bytes;
}

}  // namespace loraserve
