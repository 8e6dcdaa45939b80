// Wraps a blob that UCX made, worker address or remote key, so that what is not one is found out.
//
// UCX parses both without a length: bytes that are cut off or were never UCX's would be read past
// their end. The envelope finds accidents (truncation, another version, a mix-up); it is no defence
// against a peer that lies on purpose, which is inside the trust boundary of the memory it reads.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"

namespace loraserve {

enum class BlobKind : uint8_t { kWorkerAddress = 1, kRemoteKey = 2 };

constexpr size_t kMaxBlobBytes = 16 << 10;

// 16 bytes before `bytes`: magic, kind, version, length, FNV-1a. REQUIRES bytes <= kMaxBlobBytes.
std::string WrapBlob(BlobKind kind, std::string_view bytes);

// The bytes within, a view into `wrapped`; kInvalidArgument.
Result<std::string_view> UnwrapBlob(BlobKind kind, std::string_view wrapped);

}  // namespace loraserve
