#include "backend/cpu/adapter_tiles.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

namespace loraserve {

namespace {

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

uint64_t ModuleBytes(const AdapterModuleSource& module, DType dtype) {
  const bool pairs = dtype == DType::kBF16;
  const int64_t a = RoundUp(module.rank, 8) * KeptRows(module.a.cols, pairs);
  const int64_t b = RoundUp(module.b.cols, 16) * KeptRows(module.rank, pairs);
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

// k-rows of a panel that lie one after another in memory, whole pairs of them where it is in pairs:
// k_end may be one past the last.
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
  const int64_t rows = KeptRows(m.k, m.bfloat16);
  uint64_t at = m.offset + static_cast<uint64_t>(panel * kPanelWidth * rows * (m.bfloat16 ? 2 : 4));
  for (int64_t k = 0; k < rows;) {
    const uint64_t within = at & (page_bytes - 1);
    const auto count = std::min(rows - k, static_cast<int64_t>((page_bytes - within) / row_bytes));
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

// Position of k-row k, column c in a run, counted from its first row: k is even where that is.
template <class To>
int64_t At(int64_t k, int64_t c, int64_t width) {
  if constexpr (std::is_same_v<To, float>) return k * width + c;
  return (k / 2 * width + c) * 2 + k % 2;
}

template <class To, class From>
void WriteRows(const From* from, int64_t stride, int64_t k_total, int64_t columns, int64_t width,
               const Run& run) {
  To* const to = reinterpret_cast<To*>(run.to);
  for (int64_t k = run.k_begin; k < run.k_end; ++k) {
    const From* const row = from + k * stride;
    const int64_t filled = k < k_total ? columns : 0;
    To* const out = to + At<To>(k - run.k_begin, 0, width);
    constexpr int64_t kStep = std::is_same_v<To, float> ? 1 : 2;  // between columns
    if (filled == kPanelWidth) {  // a fixed count, so that it becomes a few vector instructions
      for (int64_t c = 0; c < kPanelWidth; ++c) out[c * kStep] = Converted<To>(row[c]);
      continue;
    }
    for (int64_t c = 0; c < filled; ++c) out[c * kStep] = Converted<To>(row[c]);
    for (int64_t c = filled; c < width; ++c) out[c * kStep] = To{};
  }
}

template <class To, class From>
void WriteColumns(const From* from, int64_t stride, int64_t k_total, int64_t columns, int64_t width,
                  const Run& run) {
  To* to = reinterpret_cast<To*>(run.to);
  // So many k-rows at a time stay in the first-level cache while their columns are gathered.
  constexpr int64_t kRows = 64;
  for (int64_t begin = run.k_begin; begin < run.k_end; begin += kRows) {
    const int64_t count = std::min(kRows, run.k_end - begin);
    const int64_t filled = std::clamp<int64_t>(k_total - begin, 0, count);
    for (int64_t c = 0; c < width; ++c) {
      const From* const column = from + c * stride + begin;
      const int64_t read = c < columns ? filled : 0;
      for (int64_t k = 0; k < read; ++k) to[At<To>(k, c, width)] = Converted<To>(column[k]);
      for (int64_t k = read; k < count; ++k) to[At<To>(k, c, width)] = To{};
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
    const int64_t k = piece.to.k;
    ForEachRun(piece.to, arena, panel, static_cast<uint64_t>(width) * sizeof(To),
               [&](const Run& run) {
                 if (piece.transposed) {
                   WriteColumns<To>(data + first * stride, stride, k, columns, width, run);
                 } else {
                   WriteRows<To>(data + first, stride, k, columns, width, run);
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

// Cuts a matrix into pieces, between which the writing can pause.
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

class CpuAdapterInstall final : public AdapterInstall {
 public:
  CpuAdapterInstall(std::unique_ptr<CpuAdapter> adapter, std::vector<Piece> pieces, bool bfloat16,
                    std::byte* arena)
      : adapter_(std::move(adapter)),
        pieces_(std::move(pieces)),
        bfloat16_(bfloat16),
        arena_(arena) {}

  bool Write(uint64_t bytes) override {
    for (uint64_t written = 0; next_ < pieces_.size() && written < bytes; ++next_) {
      const Piece& piece = pieces_[next_];
      if (bfloat16_) {
        WritePiece<uint16_t>(piece, arena_);
      } else {
        WritePiece<float>(piece, arena_);
      }
      written += static_cast<uint64_t>((piece.panel_end - piece.panel_begin) * kPanelWidth *
                                       piece.to.k * (bfloat16_ ? 2 : 4));
    }
    return next_ < pieces_.size();
  }
  std::unique_ptr<InstalledAdapter> Finish() override { return std::move(adapter_); }

 private:
  std::unique_ptr<CpuAdapter> adapter_;
  std::vector<Piece> pieces_;
  bool bfloat16_;
  std::byte* arena_;
  size_t next_ = 0;
};

}  // namespace

uint64_t CpuAdapter::Bytes(const AdapterSource& source, DType dtype) {
  uint64_t bytes = 0;
  for (const AdapterModuleSource& module : source.modules) bytes += ModuleBytes(module, dtype);
  return bytes;
}

std::unique_ptr<AdapterInstall> CpuAdapter::StartInstall(const AdapterSource& source, DType dtype,
                                                         std::byte* arena, uint64_t page_bytes,
                                                         std::span<const PageId> pages) {
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
    to.b.offset = offset + static_cast<uint64_t>(RoundUp(
                               to.a.columns * KeptRows(to.a.k, bfloat16) * BytesOf(dtype), 64));
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
  return std::make_unique<CpuAdapterInstall>(std::move(adapter), std::move(pieces), bfloat16,
                                             arena);
}

}  // namespace loraserve
