// Grids of blocks of fibres.
#include <array>
#include <memory>
#include <vector>

#include "backend/cuda/emulation/cuda_runtime.h"
#include "backend/cuda/emulation/fibre.h"
#include "backend/cuda/emulation/stream.h"
#include "base/check.h"

namespace loraserve::emulation {

namespace {

constexpr int kLiveBlocks = 3;  // that take turns
constexpr int kLanes = 32;
constexpr uint64_t kMaxPauses = uint64_t{1} << 26;

enum class Waits : uint8_t { kNothing, kBlock, kWarp, kDone };

struct Thread {
  std::unique_ptr<Fibre> fibre = std::make_unique<Fibre>();
  Waits waits = Waits::kDone;
  uint64_t exchange = 0;
};

struct Warp {
  int live = 0;
  int arrived = 0;
  // Operands of the warp's matrix instruction.
  std::array<std::array<uint32_t, 4>, kLanes> a;
  std::array<std::array<uint32_t, 2>, kLanes> b;
};

struct Block {
  std::vector<Thread> threads;  // kept for the next block: their stacks are mapped already
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  Index index{};
  int size = 0;
  int live = 0;
  int arrived = 0;

  uint8_t* SharedStart() {
    const auto address = reinterpret_cast<uintptr_t>(shared.data());
    return shared.data() + (128 - address % 128) % 128;
  }
};

struct Grid {
  dim3 size;
  dim3 block_size;
  const std::function<void()>* body = nullptr;
  Block* block = nullptr;  // whose turn it is
  int thread = 0;
  uint64_t pauses = 0;
  uint64_t random = 1;

  uint32_t Random() {
    random = random * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(random >> 33);
  }
};

thread_local Grid* grid = nullptr;

Thread& Current() { return grid->block->threads[static_cast<size_t>(grid->thread)]; }
Warp& CurrentWarp() { return grid->block->warps[static_cast<size_t>(grid->thread / kLanes)]; }

void ReleaseWarp(Block& block, size_t warp) {
  block.warps[warp].arrived = 0;
  const size_t end = std::min((warp + 1) * kLanes, static_cast<size_t>(block.size));
  for (size_t i = warp * kLanes; i < end; ++i) {
    if (block.threads[i].waits == Waits::kWarp) block.threads[i].waits = Waits::kNothing;
  }
}

void ReleaseBlock(Block& block) {
  block.arrived = 0;
  for (int i = 0; i < block.size; ++i) {
    Thread& thread = block.threads[static_cast<size_t>(i)];
    if (thread.waits == Waits::kBlock) thread.waits = Waits::kNothing;
  }
}

void ThreadMain() {
  (*grid->body)();
  Block& block = *grid->block;
  const auto warp = static_cast<size_t>(grid->thread / kLanes);
  Current().waits = Waits::kDone;
  --block.live;
  --block.warps[warp].live;
  if (block.live > 0 && block.arrived == block.live) ReleaseBlock(block);
  if (block.warps[warp].live > 0 && block.warps[warp].arrived == block.warps[warp].live) {
    ReleaseWarp(block, warp);
  }
  Current().fibre->Suspend();
}

void StartBlock(Block& block, Index index, size_t shared_bytes) {
  block.index = index;
  block.size = static_cast<int>(grid->block_size.x * grid->block_size.y * grid->block_size.z);
  block.live = block.size;
  block.arrived = 0;
  block.shared.assign(shared_bytes + 128, 0xff);
  block.warps.assign(static_cast<size_t>((block.size + kLanes - 1) / kLanes), Warp{});
  if (block.threads.size() < static_cast<size_t>(block.size)) {
    block.threads.resize(static_cast<size_t>(block.size));
  }
  for (int i = 0; i < block.size; ++i) {
    Thread& thread = block.threads[static_cast<size_t>(i)];
    thread.waits = Waits::kNothing;
    thread.fibre->Start(ThreadMain);
    ++block.warps[static_cast<size_t>(i / kLanes)].live;
  }
}

// Every thread that can run, once, forwards or backwards. False if none could.
bool Turn(Block& block) {
  grid->block = &block;
  const bool backwards = grid->Random() % 2 != 0;
  bool ran = false;
  for (int i = 0; i < block.size; ++i) {
    grid->thread = backwards ? block.size - 1 - i : i;
    if (Current().waits != Waits::kNothing) continue;
    ran = true;
    Current().fibre->Resume();
  }
  return ran;
}

std::vector<std::unique_ptr<Block>>& SpareBlocks() {
  static thread_local std::vector<std::unique_ptr<Block>> spare;
  return spare;
}

void Run(dim3 size, dim3 block_size, size_t shared_bytes, const std::function<void()>& body) {
  LS_CHECK(grid == nullptr);
  LS_CHECK(size.x > 0 && size.y > 0 && size.z > 0 && size.y < 65536 && size.z < 65536);
  LS_CHECK(block_size.x * block_size.y * block_size.z <= 1024);
  LS_CHECK(shared_bytes <= 227 << 10);
  Grid own{.size = size, .block_size = block_size, .body = &body};
  grid = &own;
  auto& blocks = SpareBlocks();
  while (blocks.size() < kLiveBlocks) blocks.push_back(std::make_unique<Block>());
  const uint64_t total = uint64_t{size.x} * size.y * size.z;
  uint64_t next = 0;
  std::vector<Block*> live;
  std::vector<Block*> idle;
  idle.reserve(blocks.size());
  for (const auto& block : blocks) idle.push_back(block.get());
  while (next < total || !live.empty()) {
    while (next < total && !idle.empty()) {
      Block* const block = idle.back();
      idle.pop_back();
      const auto x = static_cast<unsigned>(next % size.x);
      const auto y = static_cast<unsigned>(next / size.x % size.y);
      const auto z = static_cast<unsigned>(next / size.x / size.y);
      StartBlock(*block, {x, y, z}, shared_bytes);
      live.push_back(block);
      ++next;
    }
    const size_t chosen = own.Random() % live.size();
    Block* const block = live[chosen];
    if (!Turn(*block) && block->live > 0) {
      std::fprintf(stderr, "emulation: threads of a block wait for barriers that others miss\n");
      std::abort();
    }
    if (block->live == 0) {
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(chosen));
      idle.push_back(block);
    }
  }
  grid = nullptr;
}

}  // namespace

void Launch(dim3 size, dim3 block_size, size_t shared_bytes, cudaStream_t stream,
            const std::function<void()>& body) {
  Enqueue(stream, [=] { Run(size, block_size, shared_bytes, body); });
}

Index ThreadIndex() {
  const auto i = static_cast<unsigned>(grid->thread);
  const dim3& size = grid->block_size;
  return {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
}
Index BlockIndex() { return grid->block->index; }
dim3 BlockSize() { return grid->block_size; }
dim3 GridSize() { return grid->size; }
uint8_t* SharedMemory() { return grid->block->SharedStart(); }
int Lane() { return grid->thread % kLanes; }

void BlockBarrier() {
  Block& block = *grid->block;
  Thread& thread = Current();
  if (++block.arrived == block.live) return ReleaseBlock(block);
  thread.waits = Waits::kBlock;
  thread.fibre->Suspend();
}

void WarpBarrier() {
  Warp& warp = CurrentWarp();
  Thread& thread = Current();
  if (++warp.arrived == warp.live) {
    return ReleaseWarp(*grid->block, static_cast<size_t>(grid->thread / kLanes));
  }
  thread.waits = Waits::kWarp;
  thread.fibre->Suspend();
}

void Pause() {
  if (++grid->pauses > kMaxPauses) {
    std::fprintf(stderr, "emulation: a wait for another block never ends\n");
    std::abort();
  }
  Current().fibre->Suspend();
}

uint64_t Exchange(uint64_t value, int lane) {
  Current().exchange = value;
  WarpBarrier();
  const int from = grid->thread / kLanes * kLanes + lane;
  const uint64_t result = grid->block->threads[static_cast<size_t>(from)].exchange;
  WarpBarrier();
  return result;
}

void Mma16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& warp = CurrentWarp();
  const int lane = Lane();
  std::memcpy(warp.a[static_cast<size_t>(lane)].data(), a, sizeof(a));
  std::memcpy(warp.b[static_cast<size_t>(lane)].data(), b, sizeof(b));
  WarpBarrier();
  const auto half = [](uint32_t pair, int k) {
    return BF16ToF32(static_cast<uint16_t>((k & 1) != 0 ? pair >> 16 : pair & 0xffff));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2);
    const int column = 2 * (lane % 4) + (i & 1);
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const int from_a = row % 8 * 4 + k % 8 / 2;
      const int from_b = column * 4 + k % 8 / 2;
      const int reg_a = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0);
      const auto& a = warp.a[static_cast<size_t>(from_a)];
      const auto& b = warp.b[static_cast<size_t>(from_b)];
      sum += half(a[static_cast<size_t>(reg_a)], k) * half(b[k >= 8 ? 1 : 0], k);
    }
    d[i] += sum;
  }
  WarpBarrier();
}

void LoadMatrixTransposed(uint32_t (&r)[4], const void* row) {
  const auto own = reinterpret_cast<uint64_t>(row);
  LS_CHECK(own % 16 == 0);
  const int lane = Lane();
  Current().exchange = own;
  WarpBarrier();
  const int warp_begin = grid->thread / kLanes * kLanes;
  const auto first = static_cast<size_t>(warp_begin);
  for (size_t i = 0; i < 4; ++i) {
    uint32_t pair = 0;
    for (size_t j = 0; j < 2; ++j) {
      const size_t from = first + 8 * i + 2 * static_cast<size_t>(lane % 4) + j;
      uint16_t value;
      // Lanes exchange words, and this one is an address.
      // NOLINTNEXTLINE(performance-no-int-to-ptr)
      const auto* row_of = reinterpret_cast<const uint16_t*>(grid->block->threads[from].exchange);
      std::memcpy(&value, row_of + lane / 4, sizeof(value));
      pair |= static_cast<uint32_t>(value) << (16 * j);
    }
    r[i] = pair;
  }
  WarpBarrier();
}

void CopyAsync16(void* shared, const void* global, bool valid) {
  LS_CHECK(reinterpret_cast<uintptr_t>(shared) % 16 == 0);
  LS_CHECK(reinterpret_cast<uintptr_t>(global) % 16 == 0);
  if (valid) {
    std::memcpy(shared, global, 16);
  } else {
    std::memset(shared, 0, 16);
  }
}

}  // namespace loraserve::emulation
