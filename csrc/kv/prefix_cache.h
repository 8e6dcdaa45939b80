// Full KV blocks kept after use, found again by the exact tokens that led to them.
//
// A tree: the root of each namespace (tenant and adapter revision), then one node for each full
// block. A node owns its block. Tokens are compared, not only their hashes, so a collision can
// never serve another prompt's keys. Not thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kv/block_pool.h"
#include "memory/eviction_order.h"

namespace loraserve {

class PrefixCache {
 public:
  using NodeId = uint32_t;
  static constexpr NodeId kNone = UINT32_MAX;

  // `pool` and `order` outlive the cache; evicted blocks go back to the pool.
  PrefixCache(BlockPool* pool, EvictionOrder* order, int block_size)
      : pool_(pool), order_(order), block_size_(block_size) {}

  // Seconds to compute a block again, for each of its pages. Of what is released from now on.
  void SetCost(double seconds) { cost_ = seconds; }

  // The root of a namespace; stays valid while it has children or users.
  NodeId Root(const std::string& name);
  // The child of `parent` for these `block_size` tokens, or kNone.
  NodeId Find(NodeId parent, std::span<const int32_t> tokens) const;
  // Adds a node that takes over `block`, with one user. REQUIRES: Find(parent, tokens) is kNone.
  NodeId Insert(NodeId parent, std::span<const int32_t> tokens, BlockId block);

  BlockId block(NodeId node) const { return nodes_[node].block; }
  // A node with users is not evicted. Roots are used too, while a sequence may still insert.
  void Use(NodeId node);
  void Release(NodeId node, uint64_t now);

  // Of the node that would be evicted next; nothing if none can be.
  std::optional<EvictionKey> NextKey() const;
  // Frees that node's block. REQUIRES: NextKey() has a value.
  void Evict();
  // Blocks that evictions could free, one after another.
  uint32_t evictable() const { return evictable_; }

 private:
  struct Node {
    NodeId parent = kNone;
    BlockId block = 0;
    uint64_t hash = 0;
    std::vector<int32_t> tokens;
    uint32_t users = 0;
    uint32_t children = 0;
    uint32_t uses = 0;  // ever
    EvictionKey key;    // since its last user left
    bool live = false;
    std::string name;  // of a root
  };

  static uint64_t Hash(NodeId parent, std::span<const int32_t> tokens);
  NodeId NewNode();
  bool is_root(const Node& node) const { return node.parent == kNone; }
  void Remove(NodeId node);
  void DropIfIdleRoot(NodeId node);

  BlockPool* pool_;
  EvictionOrder* order_;
  int block_size_;
  double cost_ = 0;
  std::vector<Node> nodes_;
  std::vector<NodeId> unused_;
  std::unordered_multimap<uint64_t, NodeId> by_hash_;
  std::unordered_map<std::string, NodeId> roots_;
  std::set<std::pair<EvictionKey, NodeId>> idle_leaves_;
  uint32_t evictable_ = 0;  // non-root nodes without users
};

}  // namespace loraserve
