// The CPU's inner loops as a table of functions, one table per instruction set.
//
// Every result is batch-invariant: the order of each reduction depends on its length and on
// absolute positions only, never on how many rows, which chunk or which thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

namespace loraserve {

inline constexpr int kPanelWidth = 16;

// A panel's k-rows as they are kept: bfloat16 in pairs, the last one with zeros where k is odd.
inline int64_t KeptRows(int64_t k, bool bfloat16) { return bfloat16 ? (k + 1) / 2 * 2 : k; }

// Columns [16 * panel_begin, 16 * panel_end) of y = x W^T. W is prepacked in panels
// [ceil(N / 16)][K][16] of float, or [ceil(N / 16)][ceil(K / 2)][16][2] of bfloat16: pairs of
// k-rows, zero where K is odd. y is written up to whole panels.
struct GemmArgs {
  const float* x = nullptr;
  int64_t x_stride = 0;
  int64_t rows = 0;
  int64_t k = 0;
  const void* weight = nullptr;
  bool bfloat16 = false;
  int64_t panel_begin = 0;
  int64_t panel_end = 0;
  const float* bias = nullptr;  // padded to whole panels, or null
  bool accumulate = false;
  float* y = nullptr;
  int64_t y_stride = 0;
  float* scratch = nullptr;  // GemmScratch(rows, k) floats
};
// Rows of x that are packed at a time, so that they stay in the second-level cache while the panels
// stream past.
inline int64_t GemmBlockRows(int64_t k) {
  return std::max<int64_t>(48, (512 << 10) / (4 * k) / 24 * 24);
}
inline int64_t GemmScratch(int64_t rows, int64_t k) { return std::min(rows, GemmBlockRows(k)) * k; }

// A matrix that lies in pages: panels of 16 columns (the last may be 8 wide) one after another,
// each [k][width] of float or [ceil(k / 2)][width][2] of bfloat16. A tile is the run of k-rows of a
// panel within one page; pages hold whole k-rows, or whole pairs of them.
struct PagedMatrix {
  const std::byte* base = nullptr;  // of the arena
  const uint32_t* pages = nullptr;  // one more readable past the last, for prefetching
  int page_shift = 0;               // log2 of the page's bytes
  uint64_t offset = 0;              // of the matrix in the run of pages, bytes
  bool bfloat16 = false;
  int64_t k = 0;
  int64_t columns = 0;  // stored: a multiple of 8
};

// y[:, c] (+)= scale * x M for the 16-column panels [panel_begin, panel_end) of M. Columns at or
// past `columns` of y are not written.
struct PagedGemmArgs {
  const float* x = nullptr;
  int64_t x_stride = 0;
  int64_t rows = 0;
  PagedMatrix matrix;
  int64_t panel_begin = 0;
  int64_t panel_end = 0;
  float scale = 1.0f;
  bool accumulate = false;
  float* y = nullptr;
  int64_t y_stride = 0;
  int64_t columns = 0;
};

// `count` queries of one KV head against one sequence's cache. Query i may see the positions
// [first[i], last[i]]. A panel is 16 positions of this head: keys lie as [padded_head_dim][16],
// values as [16 positions][16] for each 16 columns, `value_stride` floats apart; padded_head_dim is
// head_dim rounded up to 16.
struct AttentionArgs {
  const float* const* queries = nullptr;  // [count] -> [head_dim]
  const int32_t* first = nullptr;
  const int32_t* last = nullptr;
  float* const* outputs = nullptr;  // [count] -> [head_dim]
  int count = 0;                    // at most kMaxQueries
  int head_dim = 0;
  int padded_head_dim = 0;
  float scale = 1.0f;
  // By panel from position `panels_begin` on, a multiple of kAttentionSpan; kPanelsAhead more past
  // the last, of memory that may be prefetched.
  const float* const* key_panels = nullptr;
  const float* const* value_panels = nullptr;
  int32_t panels_begin = 0;
  int64_t value_stride = 0;
  float* scratch = nullptr;  // AttentionScratch(...) floats
};
inline constexpr int kMaxQueries = 64;
inline constexpr int kPanelsAhead = 8;
// Positions are taken in spans that begin at multiples of this, and each has a softmax of its own.
inline constexpr int kAttentionSpan = 256;
// What a query has found in some spans: its sums of values, then the sums of exponentials by lane
// of absolute position, then what these were taken from.
inline int64_t AttentionState(int padded_head_dim) { return padded_head_dim + 32; }
inline int64_t AttentionScratch(int padded_head_dim) {
  return kMaxQueries * padded_head_dim + (kMaxQueries + 8) * AttentionState(padded_head_dim) +
         8 * kAttentionSpan + 16;
}

struct CpuKernels {
  const char* name;
  void (*gemm)(const GemmArgs&);
  // As gemm with bfloat16 weights, after x has been rounded to bfloat16 too; sums stay float32.
  void (*rounded_gemm)(const GemmArgs&);
  void (*paged_gemm)(const PagedGemmArgs&);
  void (*attention)(const AttentionArgs&);
  // The same in two steps, whose results are the same bits: of the span at position `span` alone, a
  // state for each query, [count][AttentionState]; and the outputs from [spans][count] of them.
  void (*attention_span)(const AttentionArgs&, int32_t span, float* states);
  void (*attention_merge)(const AttentionArgs&, int spans, const float* states);
  // y = x / sqrt(mean(x^2) + eps) * weight over n values; y may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* y);
  // y = silu(gate) * up over n values.
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* y);
  // Rotates x [half | half] in place by cos and sin [half].
  void (*rope)(float* x, const float* cos, const float* sin, int64_t half);
  // log(sum(exp(x))) over n values, in double across lanes.
  float (*log_sum_exp)(const float* x, int64_t n);
};

// The best table this machine can run. `limit`, when not null, names the highest to consider:
// "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16" (with AVX512-BF16) or "generic".
const CpuKernels& SelectKernels(const char* limit);
// Whether this build has a table of that name, be it that the machine can run it or not.
bool HasKernels(const std::string& name);

}  // namespace loraserve
