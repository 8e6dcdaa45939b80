#include "transfer/slot_reader.h"

#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/clock.h"

namespace loraserve {
namespace {

constexpr size_t kScratchBytes = 2 * kSlotHeaderBytes;

// For as long as the process lives: something may still call back into it.
template <class T>
void KeepForEver(std::unique_ptr<T> object) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<std::unique_ptr<T>>;
  const std::lock_guard lock(mutex);
  kept->push_back(std::move(object));
}

Status Stuck() {
  return {StatusCode::kUnavailable,
          "gpudirect: a closed endpoint did not end its read; nothing is read any more"};
}

}  // namespace

Result<std::unique_ptr<SlotReader>> SlotReader::Create(const UcxSettings& settings) {
  ApplyUcxEnvironment(settings);
  auto transport = UcxTransport::Create(settings);
  if (!transport.ok()) {
    return transport.status();
  }
  std::unique_ptr<SlotReader> reader(new SlotReader(std::move(transport.value())));
  const Status status =
      reader->transport_->RegisterLocal(reader->scratch_, kScratchBytes, MemoryKind::kHost);
  if (!status.ok()) {
    return Status(StatusCode::kFailedPrecondition, status.message());
  }
  return reader;
}

SlotReader::SlotReader(std::unique_ptr<UcxTransport> transport) : transport_(std::move(transport)) {
  void* const scratch =
      mmap(nullptr, kScratchBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  LS_CHECK(scratch != MAP_FAILED);
  scratch_ = static_cast<uint8_t*>(scratch);
}

SlotReader::~SlotReader() {
  if (stuck_) {
    KeepForEver(std::move(transport_));
    return;
  }
  transport_.reset();
  munmap(scratch_, kScratchBytes);
}

Status SlotReader::Register(void* memory, uint64_t bytes, MemoryKind kind) {
  const std::lock_guard lock(mutex_);
  if (memory_ != nullptr) {
    return {StatusCode::kAlreadyExists, "memory: is registered"};
  }
  const Status status = transport_->RegisterLocal(memory, bytes, kind);
  if (!status.ok()) {
    return {StatusCode::kFailedPrecondition, status.message()};
  }
  memory_ = static_cast<uint8_t*>(memory);
  bytes_ = bytes;
  return {};
}

Result<std::string> SlotReader::Read(ReadRequest request) {
  const std::lock_guard lock(mutex_);
  if (stuck_) {
    return Stuck();
  }
  if (const Status status = CheckReadRequest(request, bytes_); !status.ok()) {
    return status;
  }
  uint8_t* const into = memory_ + request.local_offset;
  auto read = std::make_unique<RemoteRead>(std::move(request), into, scratch_, transport_.get(),
                                           MonotonicSeconds());
  while (true) {
    const double now_s = MonotonicSeconds();
    read->Advance(now_s);
    if (read->ended()) {
      break;
    }
    if (read->Stuck(now_s)) {
      stuck_ = true;
      KeepForEver(std::move(read));
      return Stuck();
    }
    if (transport_->Progress()) {
      continue;
    }
    int sleep_ms = transport_->SleepMs();
    const int own_ms = static_cast<int>(
        std::clamp(std::ceil((read->next_s() - MonotonicSeconds()) * 1e3), 0.0, 60e3));
    sleep_ms = sleep_ms < 0 ? own_ms : std::min(sleep_ms, own_ms);
    pollfd wait{transport_->event_fd(), POLLIN, 0};
    poll(&wait, 1, sleep_ms);  // an interruption is one more round
  }
  if (!read->ended()->ok()) {
    return *read->ended();
  }
  return read->transports();
}

}  // namespace loraserve
