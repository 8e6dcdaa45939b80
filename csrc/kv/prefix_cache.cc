#include "kv/prefix_cache.h"

#include <algorithm>

#include "base/check.h"

namespace loraserve {

// Invariants: a node's parent has at least as many users as any way of using the node gives it,
// because sequences use every node on their path; so an idle node has only idle descendants, and
// evicting leaves one by one can free every idle node. idle_leaves_ holds exactly the live non-root
// nodes without users and children.

uint64_t PrefixCache::Hash(NodeId parent, std::span<const int32_t> tokens) {
  uint64_t hash = 0x9E3779B97F4A7C15ull ^ parent;
  for (int32_t token : tokens) {  // splitmix64 steps
    hash += static_cast<uint32_t>(token) + 0x9E3779B97F4A7C15ull;
    hash = (hash ^ (hash >> 30)) * 0xBF58476D1CE4E5B9ull;
    hash = (hash ^ (hash >> 27)) * 0x94D049BB133111EBull;
    hash ^= hash >> 31;
  }
  return hash;
}

PrefixCache::NodeId PrefixCache::NewNode() {
  NodeId node;
  if (unused_.empty()) {
    node = static_cast<NodeId>(nodes_.size());
    nodes_.emplace_back();
  } else {
    node = unused_.back();
    unused_.pop_back();
    nodes_[node] = Node();
  }
  nodes_[node].live = true;
  return node;
}

PrefixCache::NodeId PrefixCache::Root(const std::string& name) {
  const auto found = roots_.find(name);
  if (found != roots_.end()) return found->second;
  const NodeId node = NewNode();
  nodes_[node].name = name;
  roots_.emplace(name, node);
  return node;
}

PrefixCache::NodeId PrefixCache::Find(NodeId parent, std::span<const int32_t> tokens) const {
  const auto [begin, end] = by_hash_.equal_range(Hash(parent, tokens));
  for (auto it = begin; it != end; ++it) {
    const Node& node = nodes_[it->second];
    if (node.parent == parent &&
        std::equal(tokens.begin(), tokens.end(), node.tokens.begin(), node.tokens.end())) {
      return it->second;
    }
  }
  return kNone;
}

PrefixCache::NodeId PrefixCache::Insert(NodeId parent, std::span<const int32_t> tokens,
                                        BlockId block) {
  LS_CHECK(static_cast<int>(tokens.size()) == block_size_);
  const NodeId id = NewNode();
  Node& node = nodes_[id];
  node.parent = parent;
  node.block = block;
  node.hash = Hash(parent, tokens);
  node.tokens.assign(tokens.begin(), tokens.end());
  node.users = 1;
  node.uses = 1;
  by_hash_.emplace(node.hash, id);
  Node& above = nodes_[parent];
  if (!is_root(above) && above.users == 0) idle_leaves_.erase({above.key, parent});
  ++above.children;
  return id;
}

void PrefixCache::Use(NodeId id) {
  Node& node = nodes_[id];
  ++node.uses;
  if (node.users++ > 0 || is_root(node)) return;
  --evictable_;
  if (node.children == 0) idle_leaves_.erase({node.key, id});
}

void PrefixCache::Release(NodeId id, uint64_t now) {
  Node& node = nodes_[id];
  LS_CHECK(node.users > 0);
  if (--node.users > 0) return;
  if (is_root(node)) return DropIfIdleRoot(id);
  node.key = order_->KeyOf(cost_, node.uses, now);
  ++evictable_;
  if (node.children == 0) idle_leaves_.emplace(node.key, id);
}

void PrefixCache::DropIfIdleRoot(NodeId id) {
  Node& node = nodes_[id];
  if (node.users > 0 || node.children > 0) return;
  roots_.erase(node.name);
  node = Node();
  unused_.push_back(id);
}

std::optional<EvictionKey> PrefixCache::NextKey() const {
  if (idle_leaves_.empty()) return std::nullopt;
  return idle_leaves_.begin()->first;
}

void PrefixCache::Evict() {
  LS_CHECK(!idle_leaves_.empty());
  const NodeId id = idle_leaves_.begin()->second;
  order_->Evicted(idle_leaves_.begin()->first);
  idle_leaves_.erase(idle_leaves_.begin());
  Remove(id);
}

void PrefixCache::Remove(NodeId id) {
  Node& node = nodes_[id];
  pool_->Free(node.block);
  const auto [begin, end] = by_hash_.equal_range(node.hash);
  by_hash_.erase(std::find_if(begin, end, [&](const auto& entry) { return entry.second == id; }));
  const NodeId parent = node.parent;
  node = Node();
  unused_.push_back(id);
  --evictable_;
  Node& above = nodes_[parent];
  --above.children;
  if (is_root(above)) {
    DropIfIdleRoot(parent);
  } else if (above.users == 0 && above.children == 0) {
    idle_leaves_.emplace(above.key, parent);
  }
}

}  // namespace loraserve
