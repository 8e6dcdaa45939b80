// The products of the base model without a device: plain loops, in the place of cuBLASLt.
#include "backend/cuda/emulation/stream.h"
#include "backend/cuda/gemm.h"

namespace loraserve {

namespace {

class EmulatedGemm final : public GemmLibrary {
 public:
  std::string version() const override { return "emulated"; }
  void Run(cudaStream_t stream, const GemmShape& s, const uint16_t* x, const uint16_t* weight,
           uint16_t* y) override {
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
};

}  // namespace

Result<std::unique_ptr<GemmLibrary>> GemmLibrary::Open() {
  return std::unique_ptr<GemmLibrary>(std::make_unique<EmulatedGemm>());
}

}  // namespace loraserve
