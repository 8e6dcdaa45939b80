// The products of the base model without a device: plain loops, in the place of cuBLASLt.
#include <atomic>
#include <set>

#include "backend/cuda/emulation/stream.h"
#include "backend/cuda/gemm.h"

namespace loraserve {

namespace {

std::atomic<uint64_t> plans{0};
std::atomic<uint64_t> late_plans{0};

class EmulatedGemm final : public GemmLibrary {
 public:
  std::string version() const override { return "emulated"; }
  void Plan(const GemmShape& shape) override { plans += planned_.insert(shape).second ? 1 : 0; }
  void Run(cudaStream_t stream, const GemmShape& s, const uint16_t* x, const uint16_t* weight,
           uint16_t* y) override {
    if (planned_.insert(s).second) ++late_plans;
    emulation::Enqueue(stream, [=] {
      for (int64_t row = 0; row < s.rows; ++row) {
        for (int64_t n = 0; n < s.n; ++n) {
          float sum = s.accumulate ? BF16ToF32(y[row * s.y_stride + n]) : 0.0f;
          for (int64_t k = 0; k < s.k; ++k) {
            sum += BF16ToF32(x[row * s.x_stride + k]) * BF16ToF32(weight[n * s.weight_stride + k]);
          }
          y[row * s.y_stride + n] = F32ToBF16(sum);
        }
      }
    });
  }

 private:
  std::set<GemmShape> planned_;
};

}  // namespace

Result<std::unique_ptr<GemmLibrary>> GemmLibrary::Open() {
  return std::unique_ptr<GemmLibrary>(std::make_unique<EmulatedGemm>());
}

}  // namespace loraserve

uint64_t EmulatedGemmPlans() { return loraserve::plans; }
uint64_t EmulatedLateGemmPlans() { return loraserve::late_plans; }
