#include "memory/page_arena.h"

#include <bit>

namespace loraserve {

// Invariant: free_list_ holds each kFree page exactly once, and counts_ counts use_.

namespace {
constexpr uint64_t kMinPageBytes = 64;
}

PageArena::PageArena(uint64_t page_bytes, uint32_t num_pages)
    : page_bytes_(page_bytes), use_(num_pages, PageUse::kFree) {
  free_list_.reserve(num_pages);
  for (PageId page = num_pages; page > 0; --page) free_list_.push_back(page - 1);
  counts_[static_cast<size_t>(PageUse::kFree)] = num_pages;
}

Result<PageArena> PageArena::Create(uint64_t page_bytes, uint32_t num_pages) {
  if (page_bytes < kMinPageBytes || !std::has_single_bit(page_bytes)) {
    return Status(StatusCode::kInvalidArgument, "page_bytes: " + std::to_string(page_bytes) +
                                                    " is not a power of two of at least " +
                                                    std::to_string(kMinPageBytes));
  }
  if (num_pages == 0) {
    return Status(StatusCode::kInvalidArgument, "num_pages: must be at least 1");
  }
  return PageArena(page_bytes, num_pages);
}

Status PageArena::CheckAllocation(size_t count, PageUse use) const {
  if (use == PageUse::kFree) {
    return Status(StatusCode::kInvalidArgument, "use: pages are allocated for kKv or kAdapter");
  }
  if (count > free_list_.size()) {
    return Status(StatusCode::kResourceExhausted,
                  "pages: asked for " + std::to_string(count) + ", free " +
                      std::to_string(free_list_.size()) + " of " + std::to_string(num_pages()));
  }
  return Status();
}

Result<std::vector<PageId>> PageArena::Allocate(uint32_t count, PageUse use) {
  Status status = CheckAllocation(count, use);  // before memory is taken for so many
  if (!status.ok()) return status;
  std::vector<PageId> pages(count);
  status = Allocate(pages, use);
  if (!status.ok()) return status;
  return pages;
}

Status PageArena::Allocate(std::span<PageId> pages, PageUse use) {
  Status status = CheckAllocation(pages.size(), use);
  if (!status.ok()) return status;
  for (PageId& page : pages) {
    page = free_list_.back();
    free_list_.pop_back();
    use_[page] = use;
  }
  counts_[static_cast<size_t>(PageUse::kFree)] -= static_cast<uint32_t>(pages.size());
  counts_[static_cast<size_t>(use)] += static_cast<uint32_t>(pages.size());
  return status;
}

Status PageArena::Free(std::span<const PageId> pages) {
  for (size_t i = 0; i < pages.size(); ++i) {
    const PageId page = pages[i];
    const bool known = page < use_.size();
    if (known && use_[page] != PageUse::kFree) {
      --counts_[static_cast<size_t>(use_[page])];
      ++counts_[static_cast<size_t>(PageUse::kFree)];
      undo_.push_back(use_[page]);
      use_[page] = PageUse::kFree;
      continue;
    }
    for (size_t j = i; j > 0; --j) {  // put back what this call changed
      const PageUse use = undo_[j - 1];
      use_[pages[j - 1]] = use;
      ++counts_[static_cast<size_t>(use)];
      --counts_[static_cast<size_t>(PageUse::kFree)];
    }
    undo_.clear();
    return Status(StatusCode::kInvalidArgument,
                  "pages: page " + std::to_string(page) +
                      (known ? " is free already" : " is outside the arena"));
  }
  undo_.clear();
  free_list_.insert(free_list_.end(), pages.rbegin(), pages.rend());
  return Status();
}

}  // namespace loraserve
