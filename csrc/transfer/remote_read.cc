#include "transfer/remote_read.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "transfer/wire.h"

namespace loraserve {
namespace {

constexpr std::string_view kSlotMagic = "LORASLOT";
constexpr size_t kNoPiece = SIZE_MAX;
// What is on its way when a read is cancelled may arrive within this time; the endpoint serves
// others too and is not closed for it.
constexpr double kCancelSeconds = 2.0;

// `read`: whether data were read since it was what the request says.
Status CheckHeader(const uint8_t* header, const ReadRequest& request, bool read) {
  const std::string_view bytes(reinterpret_cast<const char*>(header), kSlotHeaderBytes);
  if (!bytes.starts_with(kSlotMagic)) {
    return {StatusCode::kNotFound, "slot: none lies at this address"};
  }
  WireReader fields(bytes.substr(kSlotMagic.size()));
  const uint64_t generation = fields.U64();
  const uint64_t size_bytes = fields.U64();
  if (generation != request.generation) {
    return {StatusCode::kNotFound, "generation: " + std::to_string(request.generation) +
                                       " was leased, the slot has " + std::to_string(generation)};
  }
  if (size_bytes != request.size_bytes) {
    // Who has read nothing may read in another way; what was read of a slot that changed is lost.
    return {read ? StatusCode::kNotFound : StatusCode::kFailedPrecondition,
            "size_bytes: " + std::to_string(request.size_bytes) + " were asked for, the slot has " +
                std::to_string(size_bytes)};
  }
  return {};
}

}  // namespace

Status CheckReadRequest(const ReadRequest& request, uint64_t capacity_bytes) {
  const auto wrong = [](std::string what) {
    return Status(StatusCode::kInvalidArgument, std::move(what));
  };
  if (request.header_bytes != kSlotHeaderBytes) {
    return wrong("header_bytes: " + std::to_string(request.header_bytes) + ", this version reads " +
                 std::to_string(kSlotHeaderBytes));
  }
  if (request.generation == 0) {
    return wrong("generation: 0 is no sealed slot's");
  }
  if (request.size_bytes > UINT64_MAX - kSlotHeaderBytes ||
      request.address > UINT64_MAX - kSlotHeaderBytes - request.size_bytes) {
    return wrong("address: the slot ends past the address space");
  }
  if (request.skip_bytes >= request.size_bytes) {
    return wrong("skip_bytes: " + std::to_string(request.skip_bytes) + " of " +
                 std::to_string(request.size_bytes));
  }
  const uint64_t length = request.size_bytes - request.skip_bytes;
  if (request.local_offset > capacity_bytes || length > capacity_bytes - request.local_offset) {
    return wrong("local_offset: " + std::to_string(length) + " bytes at " +
                 std::to_string(request.local_offset) + " of a pool of " +
                 std::to_string(capacity_bytes));
  }
  if (request.timeout_us == 0) {
    return wrong("timeout_us: 0");
  }
  return {};
}

RemoteRead::RemoteRead(ReadRequest request, uint8_t* into, uint8_t* scratch, Transport* transport,
                       double now_s, uint64_t piece_bytes)
    : request_(std::move(request)),
      into_(into),
      scratch_(scratch),
      transport_(transport),
      // A day is as good as for ever, and keeps the sum exact.
      deadline_s_(now_s + std::min(static_cast<double>(request_.timeout_us) / 1e6, 86400.0)),
      length_(request_.size_bytes - request_.skip_bytes),
      piece_bytes_(piece_bytes),
      pieces_((length_ + piece_bytes - 1) / piece_bytes) {}

void RemoteRead::Cancel(double now_s) {
  deadline_s_ = std::min(deadline_s_, now_s + kCancelSeconds);
  Fail({StatusCode::kCancelled, "read: cancelled"});
}

void RemoteRead::Fail(Status status) {
  if (!failure_) {
    failure_ = std::move(status);
  }
  stage_ = Stage::kEnding;
}

void RemoteRead::Break(double now_s) {
  if (!break_s_ && memory_) {
    break_s_ = now_s;
    memory_->Break();
  }
}

void RemoteRead::Get(uint64_t address, void* into, size_t bytes, size_t piece) {
  ++outstanding_;
  memory_->Get(address, into, bytes, [this, piece](GetOutcome outcome, const std::string& why) {
    --outstanding_;
    if (outcome == GetOutcome::kDone) {
      if (piece == kNoPiece) {
        header_there_ = true;
      } else {
        pieces_[piece] = true;
      }
    } else if (outcome == GetOutcome::kBroken && !break_s_ && !reopened_) {
      broken_ = true;
    } else if (!failure_) {
      Fail({StatusCode::kUnavailable, "peer: " + why});
    }
  });
}

void RemoteRead::GetHeader(Stage stage) {
  stage_ = stage;
  header_there_ = false;
  std::memset(scratch_, 0, kSlotHeaderBytes);
  Get(request_.address, scratch_, kSlotHeaderBytes, kNoPiece);
}

void RemoteRead::IssuePieces() {
  while (issued_ < length_ && outstanding_ < kPiecesAhead) {
    const uint64_t bytes = std::min(piece_bytes_, length_ - issued_);
    const size_t piece = issued_ / piece_bytes_;
    if (!pieces_[piece]) {
      Get(request_.address + kSlotHeaderBytes + request_.skip_bytes + issued_, into_ + issued_,
          bytes, piece);
    }
    issued_ += bytes;
  }
}

void RemoteRead::Advance(double now_s) {
  if (ended_) {
    return;
  }
  if (now_s >= deadline_s_ && !break_s_) {
    if (stage_ != Stage::kEnding) {
      Fail({StatusCode::kDeadlineExceeded, "peer: the read's time is over"});
    }
    if (outstanding_ > 0) {
      Break(now_s);
    }
  }
  while (arrived_ < length_ && pieces_[arrived_ / piece_bytes_]) {
    arrived_ = std::min(length_, arrived_ + piece_bytes_);
  }
  if (broken_ && stage_ != Stage::kEnding && outstanding_ == 0) {
    // From the first byte that is missing; the header is read again first.
    broken_ = false;
    reopened_ = true;
    memory_.reset();
    issued_ = arrived_;
    stage_ = Stage::kOpen;
  }
  if (broken_ && stage_ != Stage::kEnding) {
    return;  // others of its pieces are still to end
  }
  switch (stage_) {
    case Stage::kOpen: {
      auto opened = transport_->Open(request_.worker_address, request_.rkey);
      if (!opened.ok()) {
        Fail(opened.status());
        break;
      }
      memory_ = std::move(opened.value());
      GetHeader(Stage::kHeaderBefore);
      return;
    }
    case Stage::kHeaderBefore:
      if (!header_there_) {
        return;
      }
      if (Status status = CheckHeader(scratch_, request_, /*read=*/arrived_ > 0); !status.ok()) {
        Fail(std::move(status));
        break;
      }
      transports_ = memory_->transports();
      stage_ = Stage::kData;
      IssuePieces();
      return;
    case Stage::kData:
      IssuePieces();
      if (arrived_ == length_) {
        GetHeader(Stage::kHeaderAfter);
      }
      return;
    case Stage::kHeaderAfter:
      if (!header_there_) {
        return;
      }
      if (Status status = CheckHeader(scratch_, request_, /*read=*/arrived_ > 0); !status.ok()) {
        Fail(std::move(status));
      }
      stage_ = Stage::kEnding;
      break;
    case Stage::kEnding:
      break;
  }
  if (outstanding_ == 0) {
    memory_.reset();
    ended_ = failure_.value_or(Status());
  }
}

}  // namespace loraserve
