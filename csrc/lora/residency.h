// Which adapters are installed in pages, which are in use, and which goes first.
//
// Bookkeeping only: the bytes are moved by the model runner. Not thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "memory/page_arena.h"

namespace loraserve {

// Given by the caller, one for each load; 0 is the base model. A new revision is a new id.
using AdapterId = uint64_t;

class AdapterResidency {
 public:
  struct Entry {
    uint32_t pages_needed = 0;
    uint64_t bytes = 0;  // in pages, as a decode step reads them
    std::vector<PageId> pages;
    bool installed = false;
    bool draining = false;  // no new requests; dropped when the last one ends
    uint32_t pins = 0;      // running sequences
    uint32_t requests = 0;  // accepted and not finished
    uint64_t last_use = 0;
  };

  // `arena` outlives this.
  explicit AdapterResidency(PageArena* arena) : arena_(arena) {}

  Status Add(AdapterId id, uint32_t pages_needed, uint64_t bytes);
  bool Contains(AdapterId id) const { return entries_.count(id) > 0; }
  const Entry& entry(AdapterId id) const { return entries_.at(id); }
  size_t num_installed() const { return num_installed_; }

  // REQUIRES: enough free pages. The caller fills the pages before they are read.
  const std::vector<PageId>& Install(AdapterId id);

  // A pinned adapter is not evicted.
  void Pin(AdapterId id);
  void Unpin(AdapterId id, uint64_t now);

  // Requests keep an adapter loaded, though not installed.
  void AddRequest(AdapterId id) { ++entries_.at(id).requests; }
  void EndRequest(AdapterId id) { --entries_.at(id).requests; }

  // When the adapter that would be evicted next was last used; nothing if none can be.
  std::optional<uint64_t> OldestUse() const;
  // Frees the pages of the coldest unpinned adapter. REQUIRES: OldestUse() has a value.
  AdapterId Evict();
  // Pages that evictions could free.
  uint32_t evictable_pages() const { return evictable_pages_; }

  void StartDraining(AdapterId id) { entries_.at(id).draining = true; }
  bool Idle(AdapterId id) const { return entries_.at(id).requests == 0; }
  // Forgets the adapter; true if it was installed. REQUIRES: Idle(id) and no pins.
  bool Remove(AdapterId id);

 private:
  void FreePages(Entry& entry);

  PageArena* arena_;
  std::unordered_map<AdapterId, Entry> entries_;
  std::set<std::pair<uint64_t, AdapterId>> unpinned_;  // (last_use, id) of installed adapters
  uint32_t evictable_pages_ = 0;
  size_t num_installed_ = 0;
};

}  // namespace loraserve
