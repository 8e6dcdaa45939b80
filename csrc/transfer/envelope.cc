#include "transfer/envelope.h"

#include "base/check.h"
#include "transfer/wire.h"

namespace loraserve {
namespace {

constexpr uint16_t kMagic = 0x5542;
constexpr uint8_t kVersion = 1;
constexpr size_t kEnvelopeBytes = 16;

uint64_t Fnv1a(uint8_t kind, std::string_view bytes) {
  uint64_t hash = (0xcbf29ce484222325ull ^ kind) * 0x100000001b3ull;
  for (const char byte : bytes) {
    hash = (hash ^ static_cast<uint8_t>(byte)) * 0x100000001b3ull;
  }
  return hash;
}

}  // namespace

std::string WrapBlob(BlobKind kind, std::string_view bytes) {
  LS_CHECK(bytes.size() <= kMaxBlobBytes);
  WireWriter out;
  out.U16(kMagic);
  out.U8(static_cast<uint8_t>(kind));
  out.U8(kVersion);
  out.U32(static_cast<uint32_t>(bytes.size()));
  out.U64(Fnv1a(static_cast<uint8_t>(kind), bytes));
  return out.Take().append(bytes);
}

Result<std::string_view> UnwrapBlob(BlobKind kind, std::string_view wrapped) {
  const char* name = kind == BlobKind::kWorkerAddress ? "worker_address" : "rkey";
  const auto wrong = [&](const char* what) {
    return Status(StatusCode::kInvalidArgument, std::string(name) + ": " + what);
  };
  WireReader in(wrapped);
  const uint16_t magic = in.U16();
  const uint8_t given = in.U8();
  const uint8_t version = in.U8();
  const uint32_t size = in.U32();
  const uint64_t hash = in.U64();
  if (!in.ok() || magic != kMagic) {
    return wrong("not made by loraserve-transfer");
  }
  if (version != kVersion) {
    return wrong("of another version");
  }
  if (given != static_cast<uint8_t>(kind)) {
    return wrong("another kind of blob");
  }
  const std::string_view bytes = wrapped.substr(kEnvelopeBytes);
  if (size != bytes.size() || size == 0 || size > kMaxBlobBytes) {
    return wrong("cut off or too long");
  }
  if (hash != Fnv1a(given, bytes)) {
    return wrong("damaged");
  }
  return bytes;
}

}  // namespace loraserve
