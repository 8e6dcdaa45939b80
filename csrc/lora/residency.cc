#include "lora/residency.h"

#include <algorithm>

#include "base/check.h"

namespace loraserve {

// Invariant: evictable_ holds exactly the installed adapters that are neither pinned nor wanted,
// and evictable_pages_ is the sum of their pages; spared_ holds those that are wanted but not
// pinned; pinned_bytes_ is the sum of the pinned ones' bytes.

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

void AdapterResidency::Unlist(AdapterId id, const Entry& entry) {
  if (entry.spared()) {
    spared_.erase(id);
  } else if (entry.installed() && entry.pins == 0) {
    evictable_.erase({entry.key, id});
    evictable_pages_ -= entry.pages_needed;
  }
}

void AdapterResidency::List(AdapterId id, const Entry& entry) {
  if (entry.spared()) {
    spared_.insert(id);
  } else if (entry.installed() && entry.pins == 0) {
    evictable_.emplace(entry.key, id);
    evictable_pages_ += entry.pages_needed;
  }
}

const std::vector<PageId>& AdapterResidency::StartInstall(AdapterId id) {
  Entry& entry = entries_.at(id);
  LS_CHECK(entry.state == State::kHost);
  auto pages = arena_->Allocate(entry.pages_needed, PageUse::kAdapter);
  LS_CHECK(pages.ok());
  entry.pages = std::move(pages.value());
  entry.state = State::kInstalling;
  installing_.emplace(id, entry.bytes);
  return entry.pages;
}

void AdapterResidency::EndInstall(AdapterId id, bool complete, uint64_t now) {
  Entry& entry = entries_.at(id);
  LS_CHECK(entry.state == State::kInstalling);
  installing_.erase(id);
  if (!complete) return FreePages(entry);
  entry.state = State::kInstalled;
  entry.uses = 0;
  entry.key = KeyOf(entry, now);
  ++num_installed_;
  List(id, entry);
}

void AdapterResidency::Pin(AdapterId id) {
  Entry& entry = entries_.at(id);
  LS_CHECK(entry.installed());
  Unlist(id, entry);
  if (entry.pins++ == 0) pinned_bytes_ += entry.bytes;
  ++entry.uses;
}

void AdapterResidency::Unpin(AdapterId id, uint64_t now) {
  Entry& entry = entries_.at(id);
  LS_CHECK(entry.pins > 0);
  --entry.pins;
  if (entry.pins == 0) {
    pinned_bytes_ -= entry.bytes;
    entry.key = KeyOf(entry, now);
  }
  List(id, entry);
}

void AdapterResidency::SetWanted(AdapterId id, bool wanted) {
  Entry& entry = entries_.at(id);
  if (entry.wanted == wanted) return;
  Unlist(id, entry);
  entry.wanted = wanted;
  List(id, entry);
}

EvictionKey AdapterResidency::KeyOf(const Entry& entry, uint64_t now) const {
  const double seconds =
      install_seconds_ + install_byte_seconds_ * static_cast<double>(entry.bytes);
  return order_->KeyOf(seconds / std::max(entry.pages_needed, 1u), entry.uses, now);
}

std::optional<std::pair<EvictionKey, AdapterId>> AdapterResidency::NextToEvict() const {
  if (evictable_.empty()) return std::nullopt;
  return *evictable_.begin();
}

void AdapterResidency::Evict(AdapterId id) {
  if (const auto next = NextToEvict(); next && next->second == id) order_->Evicted(next->first);
  Uninstall(id);
}

void AdapterResidency::Uninstall(AdapterId id) {
  Entry& entry = entries_.at(id);
  LS_CHECK(entry.installed() && entry.pins == 0);
  Unlist(id, entry);
  --num_installed_;
  FreePages(entry);
}

void AdapterResidency::FreePages(Entry& entry) {
  LS_CHECK(arena_->Free(entry.pages).ok());
  entry.pages.clear();
  entry.state = State::kHost;
}

bool AdapterResidency::Idle(AdapterId id) const {
  const Entry& entry = entries_.at(id);
  return entry.requests == 0 && entry.state != State::kInstalling;
}

bool AdapterResidency::Remove(AdapterId id) {
  LS_CHECK(Idle(id) && entries_.at(id).pins == 0);
  const bool installed = entries_.at(id).installed();
  if (installed) Uninstall(id);
  entries_.erase(id);
  return installed;
}

}  // namespace loraserve
