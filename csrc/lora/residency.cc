#include "lora/residency.h"

#include "base/check.h"

namespace loraserve {

// Invariant: unpinned_ holds exactly the installed adapters without pins, and evictable_pages_ is
// the sum of their pages.

Status AdapterResidency::Add(AdapterId id, uint32_t pages_needed, uint64_t bytes) {
  if (id == 0 || Contains(id)) {
    return Status(StatusCode::kAlreadyExists, "adapter: id " + std::to_string(id) + " is taken");
  }
  if (pages_needed > arena_->num_pages()) {
    return Status(StatusCode::kResourceExhausted,
                  "memory_bytes: the adapter needs " + std::to_string(pages_needed) +
                      " pages, the engine has " + std::to_string(arena_->num_pages()));
  }
  Entry& entry = entries_[id];
  entry.pages_needed = pages_needed;
  entry.bytes = bytes;
  return Status();
}

const std::vector<PageId>& AdapterResidency::Install(AdapterId id) {
  Entry& entry = entries_.at(id);
  LS_CHECK(!entry.installed);
  auto pages = arena_->Allocate(entry.pages_needed, PageUse::kAdapter);
  LS_CHECK(pages.ok());
  entry.pages = std::move(pages.value());
  entry.installed = true;
  ++num_installed_;
  if (entry.pins == 0) {
    unpinned_.emplace(entry.last_use, id);
    evictable_pages_ += entry.pages_needed;
  }
  return entry.pages;
}

void AdapterResidency::Pin(AdapterId id) {
  Entry& entry = entries_.at(id);
  if (entry.pins++ > 0 || !entry.installed) return;
  unpinned_.erase({entry.last_use, id});
  evictable_pages_ -= entry.pages_needed;
}

void AdapterResidency::Unpin(AdapterId id, uint64_t now) {
  Entry& entry = entries_.at(id);
  LS_CHECK(entry.pins > 0);
  if (--entry.pins > 0) return;
  entry.last_use = now;
  if (!entry.installed) return;
  unpinned_.emplace(now, id);
  evictable_pages_ += entry.pages_needed;
}

std::optional<uint64_t> AdapterResidency::OldestUse() const {
  if (unpinned_.empty()) return std::nullopt;
  return unpinned_.begin()->first;
}

AdapterId AdapterResidency::Evict() {
  LS_CHECK(!unpinned_.empty());
  const AdapterId id = unpinned_.begin()->second;
  unpinned_.erase(unpinned_.begin());
  Entry& entry = entries_.at(id);
  evictable_pages_ -= entry.pages_needed;
  FreePages(entry);
  return id;
}

void AdapterResidency::FreePages(Entry& entry) {
  LS_CHECK(arena_->Free(entry.pages).ok());
  entry.pages.clear();
  entry.installed = false;
  --num_installed_;
}

bool AdapterResidency::Remove(AdapterId id) {
  Entry& entry = entries_.at(id);
  LS_CHECK(entry.pins == 0 && entry.requests == 0);
  const bool installed = entry.installed;
  if (installed) {
    unpinned_.erase({entry.last_use, id});
    evictable_pages_ -= entry.pages_needed;
    FreePages(entry);
  }
  entries_.erase(id);
  return installed;
}

}  // namespace loraserve
