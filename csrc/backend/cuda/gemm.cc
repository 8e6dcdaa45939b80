#include "backend/cuda/gemm.h"

#include <array>
#include <cstdlib>
#include <map>

#include "backend/cuda/cublas_lt.h"
#include "backend/cuda/device_memory.h"
#include "base/check.h"

namespace loraserve {

namespace {

constexpr uint64_t kWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for Hopper

class CublasLt final : public GemmLibrary {
 public:
  CublasLt(const CublasLtApi& api, LtHandle handle, std::unique_ptr<DeviceBuffer> workspace)
      : api_(api), handle_(handle), workspace_(std::move(workspace)) {}
  ~CublasLt() override {
    for (const auto& [shape, plan] : plans_) {
      for (const LtMatrixLayout layout : plan.layouts) api_.MatrixLayoutDestroy(layout);
      api_.MatmulDescDestroy(plan.operation);
    }
    api_.Destroy(handle_);
  }

  std::string version() const override { return std::to_string(api_.GetVersion()); }

  void Plan(const GemmShape& shape) override { Planned(shape); }

  void Run(cudaStream_t stream, const GemmShape& shape, const uint16_t* x, const uint16_t* weight,
           uint16_t* y) override {
    const Choice& plan = Planned(shape);
    const float alpha = 1.0f;
    const float beta = shape.accumulate ? 1.0f : 0.0f;
    const LtStatus status =
        api_.Matmul(handle_, plan.operation, &alpha, weight, plan.layouts[0], x, plan.layouts[1],
                    &beta, y, plan.layouts[2], y, plan.layouts[2], &plan.algorithm,
                    workspace_->DeviceBuffer::data(), kWorkspaceBytes, stream);
    if (status != 0) {
      std::fprintf(stderr, "cublasLtMatmul: status %d for [%ld, %ld] x [%ld, %ld]\n", status,
                   static_cast<long>(shape.rows), static_cast<long>(shape.k),
                   static_cast<long>(shape.n), static_cast<long>(shape.k));
      std::abort();
    }
  }

 private:
  // What the library thinks best for a shape, asked for once.
  struct Choice {
    LtMatmulDesc operation = nullptr;
    std::array<LtMatrixLayout, 3> layouts{};  // weight, x, y
    LtMatmulAlgo algorithm{};
  };

  const Choice& Planned(const GemmShape& shape) {
    auto found = plans_.find(shape);
    if (found == plans_.end()) found = plans_.emplace(shape, MakePlan(shape)).first;
    return found->second;
  }

  Choice MakePlan(const GemmShape& s) {
    Choice plan;
    // The library is column-major: it sees y^T [n, rows] = W [k, n]^T x^T [k, rows].
    const auto u = [](int64_t value) { return static_cast<uint64_t>(value); };
    LS_CHECK(api_.MatmulDescCreate(&plan.operation, kLtCompute32F, kLtR32F) == 0);
    const int32_t transposed = kLtTransposed;
    LS_CHECK(api_.MatmulDescSetAttribute(plan.operation, kLtDescTransA, &transposed,
                                         sizeof(transposed)) == 0);
    LS_CHECK(api_.MatrixLayoutCreate(&plan.layouts[0], kLtR16BF, u(s.k), u(s.n), s.weight_stride) ==
             0);
    LS_CHECK(api_.MatrixLayoutCreate(&plan.layouts[1], kLtR16BF, u(s.k), u(s.rows), s.x_stride) ==
             0);
    LS_CHECK(api_.MatrixLayoutCreate(&plan.layouts[2], kLtR16BF, u(s.n), u(s.rows), s.y_stride) ==
             0);
    LtMatmulPreference preference = nullptr;
    LS_CHECK(api_.MatmulPreferenceCreate(&preference) == 0);
    const uint64_t limit = kWorkspaceBytes;
    LS_CHECK(api_.MatmulPreferenceSetAttribute(preference, kLtPreferenceMaxWorkspace, &limit,
                                               sizeof(limit)) == 0);
    LtHeuristicResult best{};
    int count = 0;
    const LtStatus status =
        api_.MatmulAlgoGetHeuristic(handle_, plan.operation, plan.layouts[0], plan.layouts[1],
                                    plan.layouts[2], plan.layouts[2], preference, 1, &best, &count);
    api_.MatmulPreferenceDestroy(preference);
    if (status != 0 || count == 0 || best.state != 0) {
      std::fprintf(stderr, "cublasLt: no algorithm for [%ld, %ld] x [%ld, %ld] (status %d)\n",
                   static_cast<long>(s.rows), static_cast<long>(s.k), static_cast<long>(s.n),
                   static_cast<long>(s.k), status);
      std::abort();
    }
    plan.algorithm = best.algorithm;
    return plan;
  }

  CublasLtApi api_;
  LtHandle handle_;
  std::unique_ptr<DeviceBuffer> workspace_;
  std::map<GemmShape, Choice> plans_;
};

}  // namespace

Result<std::unique_ptr<GemmLibrary>> GemmLibrary::Open() {
  auto api = OpenCublasLt();
  if (!api.ok()) return api.status();
  auto workspace = DeviceBuffer::Create(kWorkspaceBytes, "device: the workspace of cuBLASLt");
  if (!workspace.ok()) return workspace.status();
  LtHandle handle = nullptr;
  const LtStatus status = api.value().Create(&handle);
  if (status != 0) {
    return Status(StatusCode::kUnavailable,
                  "device: cuBLASLt cannot use it, status " + std::to_string(status));
  }
  return std::unique_ptr<GemmLibrary>(
      std::make_unique<CublasLt>(api.value(), handle, std::move(workspace.value())));
}

}  // namespace loraserve
