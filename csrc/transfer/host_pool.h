// The node's host pool as this process sees it: its memory file, mapped.
#pragma once

#include <cstdint>
#include <memory>

#include "base/status.h"

namespace loraserve {

class HostPool {
 public:
  // Takes `fd`, which is closed either way. kInvalidArgument where it is no file of at least
  // `capacity_bytes`, or one that may shrink under the mapping.
  static Result<std::unique_ptr<HostPool>> Map(int fd, uint64_t capacity_bytes);
  ~HostPool();
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  uint8_t* data() const { return data_; }
  uint64_t capacity_bytes() const { return capacity_bytes_; }
  bool Holds(uint64_t offset, uint64_t length) const {
    return offset <= capacity_bytes_ && length <= capacity_bytes_ - offset;
  }
  // Enters the next part of the pages that the pool had when it was mapped, from its start to its
  // first hole, into this process's page tables, so that no read has to; a moment's work. False
  // once all are. Takes no memory that the node has not taken.
  bool PopulateSome();

 private:
  HostPool(uint8_t* data, uint64_t capacity_bytes, uint64_t present_bytes)
      : data_(data), capacity_bytes_(capacity_bytes), present_bytes_(present_bytes) {}
  uint8_t* const data_;
  const uint64_t capacity_bytes_;
  const uint64_t present_bytes_;
  uint64_t populated_ = 0;
};

}  // namespace loraserve
