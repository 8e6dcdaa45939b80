#include "backend/registry.h"

#include <sched.h>

#include <algorithm>
#include <initializer_list>

#include "backend/cpu/cpu_backend.h"

#if defined(LORASERVE_HAS_CUDA) || defined(LORASERVE_CUDA_EMULATED)
#include "backend/cuda/cuda_backend.h"
#endif

namespace loraserve {

namespace {

#if defined(LORASERVE_HAS_CUDA)
constexpr char kCudaDevice[] = "cuda";
constexpr char kDevices[] = "cpu, cuda";
#elif defined(LORASERVE_CUDA_EMULATED)
constexpr char kCudaDevice[] = "cuda-emulated";  // for tests
constexpr char kDevices[] = "cpu, cuda-emulated";
#else
constexpr char kDevices[] = "cpu";
#endif

const char* NameOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kF16:
      return "float16";
    case DType::kBF16:
      return "bfloat16";
  }
  return "?";
}

// kInvalidArgument if `dtype` is none of those that `device` takes.
Status CheckDType(const char* option, std::optional<DType> dtype, const std::string& device,
                  std::initializer_list<DType> taken) {
  if (!dtype || std::find(taken.begin(), taken.end(), *dtype) != taken.end()) return Status();
  std::string names;
  for (const DType one : taken) names += (names.empty() ? "" : ", ") + std::string(NameOf(one));
  return Status(StatusCode::kInvalidArgument, std::string(option) + ": " + NameOf(*dtype) + " on " +
                                                  device + "; it takes " + names);
}

int UsableCores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

}  // namespace

Result<std::unique_ptr<Backend>> CreateBackend(const BackendOptions& options) {
  if (options.threads < 0 || options.threads > 1024) {
    return Status(StatusCode::kInvalidArgument,
                  "threads: " + std::to_string(options.threads) + " is not in [0, 1024]");
  }
  if (options.device == "cpu") {
    if (!options.isa.empty() && !HasKernels(options.isa)) {
      return Status(StatusCode::kInvalidArgument,
                    "isa: '" + options.isa + "' is not an instruction set of this build");
    }
    for (const Status& status :
         {CheckDType("adapter_dtype", options.adapter_dtype, "cpu", {DType::kF32, DType::kBF16}),
          CheckDType("activation_dtype", options.activation_dtype, "cpu",
                     {DType::kF32, DType::kBF16})}) {
      if (!status.ok()) return status;
    }
    return std::unique_ptr<Backend>(std::make_unique<CpuBackend>(
        CpuBackendOptions{.threads = options.threads > 0 ? options.threads : UsableCores(),
                          .adapter_dtype = options.adapter_dtype,
                          .activation_dtype = options.activation_dtype.value_or(DType::kF32),
                          .isa = options.isa}));
  }
#if defined(LORASERVE_HAS_CUDA) || defined(LORASERVE_CUDA_EMULATED)
  if (options.device == kCudaDevice) {
    const Status status =
        CheckDType("activation_dtype", options.activation_dtype, "cuda", {DType::kBF16});
    if (!status.ok()) return status;
    auto backend = CudaBackend::Create();
    if (!backend.ok()) return backend.status();
    return std::unique_ptr<Backend>(std::move(backend.value()));
  }
#endif
  return Status(StatusCode::kInvalidArgument,
                "device: '" + options.device + "' is not in this build; it has: " + kDevices);
}

}  // namespace loraserve
