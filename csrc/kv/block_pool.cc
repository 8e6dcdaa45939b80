#include "kv/block_pool.h"

#include "base/check.h"

namespace loraserve {

std::optional<BlockId> BlockPool::Allocate() {
  if (arena_->count(PageUse::kFree) < pages_per_block_) return std::nullopt;
  auto pages = arena_->Allocate(pages_per_block_, PageUse::kKv);
  LS_CHECK(pages.ok());
  if (unused_.empty()) {
    blocks_.push_back(std::move(pages.value()));
    return static_cast<BlockId>(blocks_.size() - 1);
  }
  const BlockId block = unused_.back();
  unused_.pop_back();
  blocks_[block] = std::move(pages.value());
  return block;
}

void BlockPool::Free(BlockId block) {
  LS_CHECK(!blocks_[block].empty());
  LS_CHECK(arena_->Free(blocks_[block]).ok());
  blocks_[block].clear();
  unused_.push_back(block);
}

}  // namespace loraserve
