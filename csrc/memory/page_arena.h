// One arena of equal pages that KV blocks and adapter tiles both live in.
//
// The arena hands out page numbers and never touches the memory behind them, so the same class
// serves host and device memory and is testable anywhere. Not thread-safe: one owner, the engine
// thread.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "base/page_id.h"
#include "base/status.h"

namespace loraserve {

// What a page holds now. Either use may grow while the other shrinks.
enum class PageUse : uint8_t { kFree, kKv, kAdapter };

class PageArena {
 public:
  // `page_bytes` is a power of two of at least 64 (a cache line); `num_pages` is at least 1.
  static Result<PageArena> Create(uint64_t page_bytes, uint32_t num_pages);

  // Hands out `count` pages for `use`, or none: kResourceExhausted if fewer are free. Freed pages
  // are reused last in, first out, while they are warm in the caches.
  Result<std::vector<PageId>> Allocate(uint32_t count, PageUse use);
  // The same into the caller's memory, as many as it holds.
  Status Allocate(std::span<PageId> pages, PageUse use);

  // Gives pages back. A page that is out of range, free already or listed twice is refused with
  // kInvalidArgument and nothing is changed.
  Status Free(std::span<const PageId> pages);

  uint64_t page_bytes() const { return page_bytes_; }
  uint32_t num_pages() const { return static_cast<uint32_t>(use_.size()); }
  uint32_t count(PageUse use) const { return counts_[static_cast<size_t>(use)]; }
  uint64_t offset(PageId page) const { return page * page_bytes_; }

 private:
  PageArena(uint64_t page_bytes, uint32_t num_pages);
  Status CheckAllocation(size_t count, PageUse use) const;

  uint64_t page_bytes_;
  std::vector<PageUse> use_;       // by page
  std::vector<PageId> free_list_;  // exactly the pages whose use is kFree
  std::array<uint32_t, 3> counts_{};
  std::vector<PageUse> undo_;  // scratch of Free: former uses, empty between calls
};

}  // namespace loraserve
