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
  // `arena` outlives the pool.
  BlockPool(PageArena* arena, uint32_t pages_per_block)
      : arena_(arena), pages_per_block_(pages_per_block) {}

  // Nothing if fewer than pages_per_block pages are free.
  std::optional<BlockId> Allocate();
  void Free(BlockId block);

  std::span<const PageId> pages(BlockId block) const { return blocks_[block]; }
  uint32_t pages_per_block() const { return pages_per_block_; }

 private:
  PageArena* arena_;
  uint32_t pages_per_block_;
  std::vector<std::vector<PageId>> blocks_;  // empty where the id is unused
  std::vector<BlockId> unused_;
};

}  // namespace loraserve
