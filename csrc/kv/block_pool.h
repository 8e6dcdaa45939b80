// KV blocks on the pages of the arena. One block holds all layers of `block_size` tokens.
//
// Hands out numbers only and never touches the memory. Not thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "memory/page_arena.h"

namespace loraserve {

using BlockId = uint32_t;

class BlockPool {
 public:
  // `arena` outlives the pool. REQUIRES: pages_per_block > 0.
  BlockPool(PageArena* arena, uint32_t pages_per_block)
      : arena_(arena), pages_per_block_(pages_per_block) {}

  // Nothing if fewer than pages_per_block pages are free.
  std::optional<BlockId> Allocate();
  void Free(BlockId block);

  // Valid until the next Allocate().
  std::span<const PageId> pages(BlockId block) const {
    return {&pages_[size_t{block} * pages_per_block_], pages_per_block_};
  }
  uint32_t pages_per_block() const { return pages_per_block_; }

 private:
  static constexpr PageId kNoPage = UINT32_MAX;
  std::span<PageId> own_pages(BlockId block) {
    return {&pages_[size_t{block} * pages_per_block_], pages_per_block_};
  }

  PageArena* arena_;
  uint32_t pages_per_block_;
  // Of all blocks, one after another, since every step reads those of all its sequences. The first
  // is kNoPage where the id is unused.
  std::vector<PageId> pages_;
  std::vector<BlockId> unused_;
};

}  // namespace loraserve
