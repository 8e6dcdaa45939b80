// One read of a peer's slot into the pool: slot header, packed bytes in pieces, slot header again.
//
// The generation in the slot header says whether the bytes in between were those that were asked
// for: the exporter changes it before it changes a byte. What the bytes are is checked by the node,
// against hashes that it has from elsewhere.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "transfer/messages.h"
#include "transfer/transport.h"

namespace loraserve {

constexpr size_t kSlotHeaderBytes = 64;
constexpr uint64_t kPieceBytes = 16 << 20;
// Pieces on their way at a time: enough to keep a link busy, few enough to cancel soon.
constexpr uint64_t kPiecesAhead = 4;
// A forced close completes what is outstanding at once; where it does not, nothing of this process
// can be trusted to have stopped writing.
constexpr double kBreakGraceSeconds = 5.0;

class RemoteRead {
 public:
  // `into`: where packed byte `skip_bytes` goes; room for the rest of size_bytes. `scratch`:
  // registered, 2 * kSlotHeaderBytes, this read's alone. REQUIRES CheckReadRequest.
  RemoteRead(ReadRequest request, uint8_t* into, uint8_t* scratch, Transport* transport,
             double now_s, uint64_t piece_bytes = kPieceBytes);

  // Begins; does what a completion, the time or a cancellation asks for. Afterwards `ended` and
  // `arrived` may have changed.
  void Advance(double now_s);
  void Cancel(double now_s);

  // Without a gap, from the start of what is read.
  uint64_t arrived() const { return arrived_; }
  // That it goes over; empty where that is not known.
  const std::string& transports() const { return transports_; }
  // Set once nothing is outstanding any more.
  const std::optional<Status>& ended() const { return ended_; }
  // When Advance has something to do at the latest.
  double next_s() const { return break_s_ ? *break_s_ + kBreakGraceSeconds : deadline_s_; }
  // The forced close did not complete the reads. The process must end.
  bool Stuck(double now_s) const { return break_s_ && now_s > *break_s_ + kBreakGraceSeconds; }

 private:
  enum class Stage { kOpen, kHeaderBefore, kData, kHeaderAfter, kEnding };
  void Get(uint64_t address, void* into, size_t bytes, size_t piece);
  void GetHeader(Stage stage);
  void IssuePieces();
  void Fail(Status status);
  void Break(double now_s);

  const ReadRequest request_;
  uint8_t* const into_;
  uint8_t* const scratch_;
  Transport* const transport_;
  double deadline_s_;
  const uint64_t length_;  // of what is read
  const uint64_t piece_bytes_;

  Stage stage_ = Stage::kOpen;
  std::shared_ptr<RemoteMemory> memory_;
  bool reopened_ = false;
  bool broken_ = false;  // by another read: open again, once
  bool header_there_ = false;
  uint64_t issued_ = 0;  // of length_
  uint64_t arrived_ = 0;
  std::vector<bool> pieces_;  // arrived, by number
  size_t outstanding_ = 0;
  std::string transports_;
  std::optional<double> break_s_;
  std::optional<Status> failure_;
  std::optional<Status> ended_;
};

// Ranges of a request against a pool of `capacity_bytes`: kInvalidArgument.
Status CheckReadRequest(const ReadRequest& request, uint64_t capacity_bytes);

}  // namespace loraserve
