// A request on its way through the engine.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/request.h"
#include "kv/block_pool.h"
#include "kv/prefix_cache.h"

namespace loraserve {

struct Sequence {
  // A block of the cache. A node's block belongs to the prefix cache and is only used here.
  struct Block {
    BlockId id = 0;
    PrefixCache::NodeId node = PrefixCache::kNone;
  };

  Request request;
  uint64_t arrival = 0;         // order of submission
  std::vector<int32_t> tokens;  // prompt, then output
  int32_t computed = 0;         // leading tokens whose keys and values are in the cache
  std::vector<Block> blocks;
  PrefixCache::NodeId root = PrefixCache::kNone;  // used while running
  bool running = false;
  // Overtaken too often: ahead of every sequence that was not, whatever their priorities.
  bool promoted = false;
  uint64_t overtaken_at = 0;  // while waiting: the count of admissions that promotes it
  int32_t cached_tokens = 0;  // found in the prefix cache at the first admission
  bool admitted_once = false;
  double queue_seconds = -1;  // until the start of its first step; negative before that
  std::vector<float> prompt_logprobs;
  std::vector<std::vector<std::pair<int32_t, float>>> prompt_top_logprobs;

  int32_t num_tokens() const { return static_cast<int32_t>(tokens.size()); }
  int32_t prompt_length() const { return static_cast<int32_t>(request.prompt.size()); }
  int32_t num_output() const { return num_tokens() - prompt_length(); }
  int32_t remaining() const { return num_tokens() - computed; }
};

}  // namespace loraserve
