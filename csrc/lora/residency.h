// Which adapters are in pages, on their way there or in use, and which goes first.
//
// Bookkeeping only: the bytes are written by the engine's installer. Not thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "memory/eviction_order.h"
#include "memory/page_arena.h"

namespace loraserve {

// Given by the caller, one for each load; 0 is the base model. A new revision is a new id.
using AdapterId = uint64_t;

class AdapterResidency {
 public:
  enum class State : uint8_t {
    kHost,        // no pages
    kInstalling,  // has its pages, which are being written: nobody may read or evict them
    kInstalled,
  };
  struct Entry {
    uint32_t pages_needed = 0;
    uint64_t bytes = 0;  // in pages, as a decode step reads them
    std::vector<PageId> pages;
    State state = State::kHost;
    bool draining = false;  // no new requests; dropped when the last one ends
    bool wanted = false;    // requests wait for it
    uint32_t pins = 0;      // running sequences
    uint32_t requests = 0;  // accepted and not finished
    uint32_t uses = 0;      // since it was installed
    EvictionKey key;        // since the last pin went

    bool installed() const { return state == State::kInstalled; }
    // Installed, wanted and not in use: kept for those who wait, unless somebody goes before them.
    bool spared() const { return installed() && wanted && pins == 0; }
  };

  // `arena` and `order` outlive this.
  AdapterResidency(PageArena* arena, EvictionOrder* order) : arena_(arena), order_(order) {}

  // Seconds to install an adapter: a fixed part and one for each byte in pages.
  void SetCost(double seconds, double byte_seconds) {
    install_seconds_ = seconds;
    install_byte_seconds_ = byte_seconds;
  }

  Status Add(AdapterId id, uint32_t pages_needed, uint64_t bytes);
  bool Contains(AdapterId id) const { return entries_.count(id) > 0; }
  const Entry& entry(AdapterId id) const { return entries_.at(id); }
  size_t num_installed() const { return num_installed_; }
  // Of the pinned adapters, each once: what a step reads.
  uint64_t pinned_bytes() const { return pinned_bytes_; }

  // Reserves its pages. REQUIRES: kHost and enough free pages.
  const std::vector<PageId>& StartInstall(AdapterId id);
  // The pages are written; or, if not `complete`, given up. REQUIRES: kInstalling.
  void EndInstall(AdapterId id, bool complete, uint64_t now);
  // In kInstalling, with their bytes.
  const std::unordered_map<AdapterId, uint64_t>& installing() const { return installing_; }

  // A pinned adapter is not evicted. REQUIRES: installed.
  void Pin(AdapterId id);
  void Unpin(AdapterId id, uint64_t now);
  void SetWanted(AdapterId id, bool wanted);

  // Requests keep an adapter loaded, though not installed.
  void AddRequest(AdapterId id) { ++entries_.at(id).requests; }
  void EndRequest(AdapterId id) { --entries_.at(id).requests; }

  // The adapter that would be evicted next, with its key; nothing if there is none that is neither
  // pinned nor wanted.
  std::optional<std::pair<EvictionKey, AdapterId>> NextToEvict() const;
  // Pages that such evictions could free.
  uint32_t evictable_pages() const { return evictable_pages_; }
  // The adapters that are installed and wanted but not in use; see Entry.
  const std::set<AdapterId>& spared() const { return spared_; }
  // Frees an adapter's pages. REQUIRES: installed, no pins.
  void Evict(AdapterId id);

  void StartDraining(AdapterId id) { entries_.at(id).draining = true; }
  // Neither requests nor an installer need it.
  bool Idle(AdapterId id) const;
  // Forgets the adapter; true if it was installed. REQUIRES: Idle(id) and no pins.
  bool Remove(AdapterId id);

 private:
  void Uninstall(AdapterId id);
  void FreePages(Entry& entry);
  EvictionKey KeyOf(const Entry& entry, uint64_t now) const;
  // Takes an adapter out of the sets it is in and puts it back by what it is by then.
  void Unlist(AdapterId id, const Entry& entry);
  void List(AdapterId id, const Entry& entry);

  PageArena* arena_;
  EvictionOrder* order_;
  double install_seconds_ = 0;
  double install_byte_seconds_ = 0;
  std::unordered_map<AdapterId, Entry> entries_;
  std::set<std::pair<EvictionKey, AdapterId>> evictable_;
  std::set<AdapterId> spared_;
  std::unordered_map<AdapterId, uint64_t> installing_;
  uint32_t evictable_pages_ = 0;
  uint64_t pinned_bytes_ = 0;
  size_t num_installed_ = 0;
};

}  // namespace loraserve
