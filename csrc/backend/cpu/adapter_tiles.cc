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

template <class To, class From>
To Converted(From value);
template <>
float Converted(float value) {
  return value;
}
template <>
uint16_t Converted(float value) {
  return F32ToBF16(value);
}

// Bits of a 16-bit float; which one, the type tells.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
template <>
float Converted(F16 value) {
  return F16ToF32(value.bits);
}
template <>
uint16_t Converted(F16 value) {
  return F32ToBF16(F16ToF32(value.bits));
}
template <>
float Converted(BF16 value) {
  return BF16ToF32(value.bits);
}
template <>
uint16_t Converted(BF16 value) {
  return value.bits;
}

// Rows of a panel that lie one after another in memory.
struct Run {
  int64_t k_begin = 0;
  int64_t k_end = 0;
  std::byte* to = nullptr;
};

// Calls function(run) for all of a panel whose k-rows have `row_bytes`: pages hold whole ones.
template <class Function>
void ForEachRun(const PagedMatrix& m, std::byte* arena, int64_t panel, uint64_t row_bytes,
                Function&& function) {
  const uint64_t page_bytes = uint64_t{1} << m.page_shift;
  uint64_t at = m.offset + static_cast<uint64_t>(panel * kPanelWidth * m.k * (m.bfloat16 ? 2 : 4));
  for (int64_t k = 0; k < m.k;) {
    const uint64_t within = at & (page_bytes - 1);
    const auto count = std::min(m.k - k, static_cast<int64_t>((page_bytes - within) / row_bytes));
    function(Run{.k_begin = k,
                 .k_end = k + count,
                 .to = arena + (uint64_t{m.pages[at >> m.page_shift]} << m.page_shift) + within});
    k += count;
    at += static_cast<uint64_t>(count) * row_bytes;
  }
}

// Where a panel's elements come from. The source is [columns, k] if `transposed`, else [k,
// columns], and what the panel has beyond it is zero.
struct Piece {
  PagedMatrix to;
  HostMatrix from;
  bool transposed = false;
  int64_t panel_begin = 0;
  int64_t panel_end = 0;
};

template <class To, class From>
void WriteRows(const From* from, int64_t stride, int64_t columns, int64_t width, const Run& run) {
  To* to = reinterpret_cast<To*>(run.to);
  for (int64_t k = run.k_begin; k < run.k_end; ++k, to += width) {
    const From* const row = from + k * stride;
    if (columns == kPanelWidth) {  // a fixed count, so that it becomes a few vector instructions
      for (int64_t c = 0; c < kPanelWidth; ++c) to[c] = Converted<To>(row[c]);
      continue;
    }
    for (int64_t c = 0; c < columns; ++c) to[c] = Converted<To>(row[c]);
    for (int64_t c = columns; c < width; ++c) to[c] = To{};
  }
}

template <class To, class From>
void WriteColumns(const From* from, int64_t stride, int64_t columns, int64_t width,
                  const Run& run) {
  To* to = reinterpret_cast<To*>(run.to);
  // So many k-rows at a time stay in the first-level cache while their columns are gathered.
  constexpr int64_t kRows = 64;
  for (int64_t begin = run.k_begin; begin < run.k_end; begin += kRows) {
    const int64_t count = std::min(kRows, run.k_end - begin);
    for (int64_t c = 0; c < width; ++c) {
      if (c >= columns) {
        for (int64_t k = 0; k < count; ++k) to[k * width + c] = To{};
        continue;
      }
      const From* const column = from + c * stride + begin;
      for (int64_t k = 0; k < count; ++k) to[k * width + c] = Converted<To>(column[k]);
    }
    to += count * width;
  }
}

template <class To, class From>
void WritePiece(const Piece& piece, std::byte* arena) {
  const auto* const data = static_cast<const From*>(piece.from.data);
  const int64_t source_columns = piece.transposed ? piece.from.rows : piece.from.cols;
  for (int64_t panel = piece.panel_begin; panel < piece.panel_end; ++panel) {
    const int64_t first = panel * kPanelWidth;
    const int64_t width = std::min<int64_t>(kPanelWidth, piece.to.columns - first);
    const int64_t columns = std::clamp<int64_t>(source_columns - first, 0, width);
    const int64_t stride = piece.from.cols;
    ForEachRun(piece.to, arena, panel, static_cast<uint64_t>(width) * sizeof(To),
               [&](const Run& run) {
                 if (piece.transposed) {
                   WriteColumns<To>(data + first * stride, stride, columns, width, run);
                 } else {
                   WriteRows<To>(data + first, stride, columns, width, run);
                 }
               });
  }
}

template <class To>
void WritePiece(const Piece& piece, std::byte* arena) {
  switch (piece.from.dtype) {
    case DType::kF32:
      return WritePiece<To, float>(piece, arena);
    case DType::kF16:
      return WritePiece<To, F16>(piece, arena);
    case DType::kBF16:
      return WritePiece<To, BF16>(piece, arena);
  }
}

// Cuts a matrix into pieces that are worth a thread's while.
void AddPieces(const PagedMatrix& to, const HostMatrix& from, bool transposed,
               std::vector<Piece>& pieces) {
  constexpr int64_t kElements = 1 << 16;
  const int64_t panels = (to.columns + kPanelWidth - 1) / kPanelWidth;
  const int64_t step = std::max<int64_t>(1, kElements / (kPanelWidth * to.k));
  for (int64_t panel = 0; panel < panels; panel += step) {
    pieces.push_back({.to = to,
                      .from = from,
                      .transposed = transposed,
                      .panel_begin = panel,
                      .panel_end = std::min(panels, panel + step)});
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
                                                std::span<const PageId> pages, ThreadPool& pool) {
  auto adapter = std::make_unique<CpuAdapter>();
  adapter->pages_.assign(pages.begin(), pages.end());
  adapter->pages_.push_back(pages.back());
  const bool bfloat16 = dtype == DType::kBF16;
  std::vector<Piece> pieces;
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
    AddPieces(to.a, from.a, /*transposed=*/true, pieces);
    to.b = to.a;
    to.b.offset =
        offset + static_cast<uint64_t>(RoundUp(to.a.columns * to.a.k * BytesOf(dtype), 64));
    to.b.k = from.rank;
    to.b.columns = RoundUp(from.b.cols, 16);
    AddPieces(to.b, from.b, /*transposed=*/false, pieces);
    offset += ModuleBytes(from, dtype);
    adapter->weight_bytes_ +=
        static_cast<uint64_t>(from.rank * (from.a.cols + from.b.cols) * BytesOf(dtype));

    const size_t index =
        static_cast<size_t>(from.layer) * kNumLinearModules + static_cast<size_t>(from.module);
    if (adapter->index_.size() <= index) adapter->index_.resize(index + 1, -1);
    adapter->index_[index] = static_cast<int>(adapter->modules_.size());
    adapter->modules_.push_back(to);
  }
  pool.ParallelFor(static_cast<int64_t>(pieces.size()), [&](int64_t task, int) {
    const Piece& piece = pieces[static_cast<size_t>(task)];
    if (bfloat16) {
      WritePiece<uint16_t>(piece, arena);
    } else {
      WritePiece<float>(piece, arena);
    }
  });
  return adapter;
}

}  // namespace loraserve
