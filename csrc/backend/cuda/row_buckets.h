// Row counts that steps are padded to, so that few graphs and few shapes of products serve all.
#pragma once

#include <algorithm>
#include <cstdint>

namespace loraserve {

// The least bucket that holds `rows`, and `max_rows` where that is less. From 17 rows on padding
// adds less than a half, from 513 on less than an eighth, which is what tiles of 64 rows cost too.
constexpr int64_t PaddedRowsOf(int64_t rows, int64_t max_rows) {
  int64_t unit = 1;
  if (rows > 512) {
    unit = 64;
  } else if (rows > 256) {
    unit = 32;
  } else if (rows > 64) {
    unit = 16;
  } else if (rows > 4) {
    unit = 8;
  } else if (rows > 2) {
    unit = 4;
  }
  return std::max(rows, std::min((rows + unit - 1) / unit * unit, max_rows));
}

}  // namespace loraserve
