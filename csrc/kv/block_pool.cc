#include "kv/block_pool.h"

#include "base/check.h"

namespace loraserve {

std::optional<BlockId> BlockPool::Allocate() {
  if (arena_->count(PageUse::kFree) < pages_per_block_) return std::nullopt;
  if (unused_.empty()) {
    unused_.push_back(static_cast<BlockId>(pages_.size() / pages_per_block_));
    pages_.resize(pages_.size() + pages_per_block_, kNoPage);
  }
  const BlockId block = unused_.back();
  unused_.pop_back();
  LS_CHECK(arena_->Allocate(own_pages(block), PageUse::kKv).ok());
  return block;
}

void BlockPool::Free(BlockId block) {
  const std::span<PageId> pages = own_pages(block);
  LS_CHECK(pages.front() != kNoPage);
  LS_CHECK(arena_->Free(pages).ok());
  pages.front() = kNoPage;
  unused_.push_back(block);
}

}  // namespace loraserve
