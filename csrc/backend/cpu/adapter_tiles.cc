#include "backend/cpu/adapter_tiles.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace loraserve {

namespace {

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

uint64_t ModuleBytes(const AdapterModuleSource& module, DType dtype) {
  const int64_t a = RoundUp(module.rank, 8) * module.a.cols;
  const int64_t b = RoundUp(module.b.cols, 16) * module.rank;
  // Matrices start on a cache line, so that no k-row of a panel straddles a page.
  return static_cast<uint64_t>(RoundUp(a * BytesOf(dtype), 64) + RoundUp(b * BytesOf(dtype), 64));
}

// Writes value(k, column) for every stored element; columns at or past `columns` are zero.
template <class Value>
void Fill(const PagedMatrix& m, std::byte* arena, int64_t columns, Value value) {
  const uint64_t element = m.bfloat16 ? 2 : 4;
  for (int64_t column = 0; column < m.columns; ++column) {
    const int64_t panel = column / kPanelWidth;
    const int64_t width = std::min<int64_t>(kPanelWidth, m.columns - panel * kPanelWidth);
    const uint64_t start = m.offset + static_cast<uint64_t>(panel * kPanelWidth * m.k) * element;
    for (int64_t k = 0; k < m.k; ++k) {
      const uint64_t at = start + static_cast<uint64_t>(k * width + column % kPanelWidth) * element;
      const uint64_t within = at & ((uint64_t{1} << m.page_shift) - 1);
      std::byte* const to =
          arena + (uint64_t{m.pages[at >> m.page_shift]} << m.page_shift) + within;
      const float v = column < columns ? value(k, column) : 0.0f;
      if (m.bfloat16) {
        const uint16_t bits = F32ToBF16(v);
        std::memcpy(to, &bits, 2);
      } else {
        std::memcpy(to, &v, 4);
      }
    }
  }
}

}  // namespace

uint64_t CpuAdapter::Bytes(const AdapterSource& source, DType dtype) {
  uint64_t bytes = 0;
  for (const AdapterModuleSource& module : source.modules) bytes += ModuleBytes(module, dtype);
  return bytes;
}

std::unique_ptr<CpuAdapter> CpuAdapter::Install(const AdapterSource& source, DType dtype,
                                                std::byte* arena, uint64_t page_bytes,
                                                std::span<const PageId> pages) {
  auto adapter = std::make_unique<CpuAdapter>();
  adapter->pages_.assign(pages.begin(), pages.end());
  adapter->pages_.push_back(pages.back());
  const bool bfloat16 = dtype == DType::kBF16;
  uint64_t offset = 0;
  for (const AdapterModuleSource& from : source.modules) {
    CpuAdapterModule to;
    to.rank = from.rank;
    to.out_features = from.b.cols;
    to.scaling = from.scaling;
    to.a = {.base = arena,
            .pages = adapter->pages_.data(),
            .page_shift = std::countr_zero(page_bytes),
            .offset = offset,
            .bfloat16 = bfloat16,
            .k = from.a.cols,
            .columns = RoundUp(from.rank, 8)};
    Fill(to.a, arena, from.rank, [&](int64_t k, int64_t rank) { return from.a.at(rank, k); });
    to.b = to.a;
    to.b.offset =
        offset + static_cast<uint64_t>(RoundUp(to.a.columns * to.a.k * BytesOf(dtype), 64));
    to.b.k = from.rank;
    to.b.columns = RoundUp(from.b.cols, 16);
    Fill(to.b, arena, from.b.cols, [&](int64_t rank, int64_t c) { return from.b.at(rank, c); });
    offset += ModuleBytes(from, dtype);
    adapter->weight_bytes_ +=
        static_cast<uint64_t>(from.rank * (from.a.cols + from.b.cols) * BytesOf(dtype));

    const size_t index =
        static_cast<size_t>(from.layer) * kNumLinearModules + static_cast<size_t>(from.module);
    if (adapter->index_.size() <= index) adapter->index_.resize(index + 1, -1);
    adapter->index_[index] = static_cast<int>(adapter->modules_.size());
    adapter->modules_.push_back(to);
  }
  return adapter;
}

}  // namespace loraserve
