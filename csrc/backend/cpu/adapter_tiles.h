// Adapters in pages, as the CPU kernels read them.
//
// The matrices of all modules follow each other in the adapter's run of pages. A [in][rank] and
// B [rank][out] are both panels of 16 columns, [K][16], bfloat16 in pairs of k-rows, [K /
// 2][16][2]; only A's rank is rounded up, to 8, so its last panel may be 8 wide; B's columns are
// rounded up to
// 16. Pages hold whole k-rows or pairs, so waste is that rounding and the rest of the last page.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"

namespace loraserve {

struct CpuAdapterModule {
  int rank = 0;
  int64_t out_features = 0;
  float scaling = 0;
  PagedMatrix a;  // k = in, columns = rank rounded up to 8
  PagedMatrix b;  // k = rank, columns = out rounded up to 16
};

class CpuAdapter final : public InstalledAdapter {
 public:
  // `dtype` kF32 or kBF16. `pages` holds at least Bytes(source, dtype) in all.
  static std::unique_ptr<AdapterInstall> StartInstall(const AdapterSource& source, DType dtype,
                                                      std::byte* arena, uint64_t page_bytes,
                                                      std::span<const PageId> pages);
  static uint64_t Bytes(const AdapterSource& source, DType dtype);
  uint64_t weight_bytes() const override { return weight_bytes_; }

  // Null if the adapter leaves this module alone.
  const CpuAdapterModule* Find(int layer, LinearModule module) const {
    const size_t i = static_cast<size_t>(layer) * kNumLinearModules + static_cast<size_t>(module);
    return i < index_.size() && index_[i] >= 0 ? &modules_[static_cast<size_t>(index_[i])]
                                               : nullptr;
  }

 private:
  uint64_t weight_bytes_ = 0;
  std::vector<PageId> pages_;
  std::vector<CpuAdapterModule> modules_;
  std::vector<int> index_;  // [layer][module] -> modules_, -1 where there is none
};

}  // namespace loraserve
