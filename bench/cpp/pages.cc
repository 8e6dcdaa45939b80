// The books of the pages: the arena, KV blocks on it and the cache of prefixes.
//
// Rates are of the thread's own processor time. Blocks are of 16 tokens in six pages, as for a
// model of 12 layers on the CPU.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kv/block_pool.h"
#include "kv/prefix_cache.h"
#include "memory/page_arena.h"

namespace loraserve {
namespace {

constexpr uint64_t kPageBytes = 64 << 10;
constexpr uint32_t kPages = 1 << 20;  // 64 GiB of pages of 64 KiB
constexpr uint32_t kPagesPerBlock = 6;
constexpr int kBlockSize = 16;

PageArena Arena(uint32_t pages) { return std::move(PageArena::Create(kPageBytes, pages).value()); }

void CountRate(benchmark::State& state, const char* name, int64_t each = 1) {
  state.counters[name] = benchmark::Counter(static_cast<double>(state.iterations() * each),
                                            benchmark::Counter::kIsRate);
}

// Adapters of so many pages, of which nine in ten fit: one that is drawn at random makes way for
// the next.
void ArenaChurn(benchmark::State& state) {
  const auto count = static_cast<uint32_t>(state.range(0));
  PageArena arena = Arena(kPages);
  std::vector<std::vector<PageId>> held(kPages / count * 9 / 10);
  for (auto& pages : held) pages = arena.Allocate(count, PageUse::kAdapter).value();
  std::mt19937 random(1);
  const auto next = [&] {
    auto& pages = held[random() % held.size()];
    LS_CHECK(arena.Free(pages).ok());
    pages = std::move(arena.Allocate(count, PageUse::kAdapter).value());
  };
  for (size_t i = 0; i < held.size(); ++i) next();  // scattered from here on
  for (auto _ : state) next();
  CountRate(state, "pages/s", count);
}

// Blocks of which a random one is freed and another taken.
void BlockChurn(benchmark::State& state) {
  PageArena arena = Arena(kPages);
  BlockPool pool(&arena, kPagesPerBlock);
  std::vector<BlockId> held(static_cast<size_t>(state.range(0)));
  for (BlockId& block : held) block = pool.Allocate().value();
  std::mt19937 random(1);
  for (auto _ : state) {
    BlockId& block = held[random() % held.size()];
    pool.Free(block);
    block = pool.Allocate().value();
  }
  CountRate(state, "blocks/s");
}

// The cache with `capacity` blocks in prompts of equal length, of which the first four blocks are
// one of 64 beginnings.
class Prompts {
 public:
  Prompts(uint32_t capacity, int prompt_blocks)
      : arena_(Arena(capacity * kPagesPerBlock)),
        pool_(&arena_, kPagesPerBlock),
        cache_(&pool_, &order_, kBlockSize),
        prompt_blocks_(prompt_blocks) {
    cache_.SetCost(1e-3);
  }

  std::vector<int32_t> Tokens(uint32_t prompt) const {
    std::vector<int32_t> tokens(static_cast<size_t>(prompt_blocks_ * kBlockSize));
    std::mt19937 random(prompt);
    std::mt19937 beginning(prompt % 64);
    for (size_t i = 0; i < tokens.size(); ++i) {
      tokens[i] = static_cast<int32_t>((i < 4 * kBlockSize ? beginning : random)() % 32000);
    }
    return tokens;
  }

  // What a request does: finds its blocks, computes the others, leaves all of them in the cache.
  // Returns how many were found.
  int Serve(const std::vector<int32_t>& tokens) {
    const std::span<const int32_t> all(tokens);
    path_.clear();
    path_.push_back(cache_.Root("tenant"));
    cache_.Use(path_.back());
    int found = 0;
    for (int i = 0; i < prompt_blocks_; ++i) {
      const auto block = all.subspan(static_cast<size_t>(i * kBlockSize), kBlockSize);
      PrefixCache::NodeId node = cache_.Find(path_.back(), block);
      if (node != PrefixCache::kNone) {
        cache_.Use(node);
        ++found;
      } else {
        while (arena_.count(PageUse::kFree) < kPagesPerBlock) {
          cache_.Evict();
          ++evicted;
        }
        node = cache_.Insert(path_.back(), block, pool_.Allocate().value());
      }
      path_.push_back(node);
    }
    ++now_;
    for (auto node = path_.rbegin(); node != path_.rend(); ++node) cache_.Release(*node, now_);
    return found;
  }

  int64_t evicted = 0;

 private:
  PageArena arena_;
  BlockPool pool_;
  EvictionOrder order_;
  PrefixCache cache_;
  int prompt_blocks_;
  std::vector<PrefixCache::NodeId> path_;
  uint64_t now_ = 0;
};

constexpr int kPromptBlocks = 64;

// Prompts that are in the cache from end to end: the longest there can be of a request's lookups.
void CacheHits(benchmark::State& state) {
  const auto prompts = static_cast<uint32_t>(state.range(0)) / kPromptBlocks;
  Prompts cache(static_cast<uint32_t>(state.range(0)), kPromptBlocks);
  std::vector<std::vector<int32_t>> tokens;
  for (uint32_t i = 0; i < prompts; ++i) {
    tokens.push_back(cache.Tokens(i));
    cache.Serve(tokens.back());
  }
  std::mt19937 random(1);
  for (auto _ : state) {
    LS_CHECK(cache.Serve(tokens[random() % prompts]) == kPromptBlocks);
  }
  CountRate(state, "blocks/s", kPromptBlocks);
}

// A full cache and prompts of which only the beginning is there: every other block is one evicted,
// one allocated and one inserted.
void CacheEvictions(benchmark::State& state) {
  Prompts cache(static_cast<uint32_t>(state.range(0)), kPromptBlocks);
  std::vector<std::vector<int32_t>> tokens;  // more than fit: none is there when it comes again
  for (uint32_t i = 0; i < 2 * static_cast<uint32_t>(state.range(0)) / kPromptBlocks; ++i) {
    tokens.push_back(cache.Tokens(i));
    cache.Serve(tokens.back());
  }
  cache.evicted = 0;
  size_t at = 0;
  for (auto _ : state) cache.Serve(tokens[at++ % tokens.size()]);
  CountRate(state, "blocks/s", kPromptBlocks);
  state.counters["evicted"] =
      static_cast<double>(cache.evicted) / static_cast<double>(state.iterations());
}

BENCHMARK(ArenaChurn)->ArgNames({"pages"})->Arg(1)->Arg(6)->Arg(80)->Arg(1280);
BENCHMARK(BlockChurn)->ArgNames({"live"})->Arg(1 << 12)->Arg(1 << 17);
BENCHMARK(CacheHits)->ArgNames({"blocks"})->Arg(1 << 12)->Arg(1 << 17);
BENCHMARK(CacheEvictions)->ArgNames({"blocks"})->Arg(1 << 12)->Arg(1 << 17);

}  // namespace
}  // namespace loraserve

BENCHMARK_MAIN();
