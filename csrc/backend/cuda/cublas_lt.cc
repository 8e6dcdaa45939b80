#include "backend/cuda/cublas_lt.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace loraserve {

namespace {

template <class Function>
bool Find(void* library, const char* name, Function& function, std::string& missing) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr && missing.empty()) missing = name;
  return function != nullptr;
}

}  // namespace

Result<CublasLtApi> OpenCublasLt() {
  std::vector<std::string> names = {"libcublasLt.so.13", "libcublasLt.so.12"};
  if (const char* const path = std::getenv("LORASERVE_CUBLASLT")) names = {path};
  void* library = nullptr;
  std::string failures;
  for (const std::string& name : names) {
    library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    failures += std::string(failures.empty() ? "" : "; ") + dlerror();
  }
  if (library == nullptr) {
    return Status(StatusCode::kUnavailable,
                  "device: cuda needs cuBLASLt (the wheel nvidia-cublas, or the toolkit; "
                  "LORASERVE_CUBLASLT names the file): " +
                      failures);
  }
  CublasLtApi api{};
  std::string missing;
  Find(library, "cublasLtGetVersion", api.GetVersion, missing);
  Find(library, "cublasLtCreate", api.Create, missing);
  Find(library, "cublasLtDestroy", api.Destroy, missing);
  Find(library, "cublasLtMatmulDescCreate", api.MatmulDescCreate, missing);
  Find(library, "cublasLtMatmulDescDestroy", api.MatmulDescDestroy, missing);
  Find(library, "cublasLtMatmulDescSetAttribute", api.MatmulDescSetAttribute, missing);
  Find(library, "cublasLtMatrixLayoutCreate", api.MatrixLayoutCreate, missing);
  Find(library, "cublasLtMatrixLayoutDestroy", api.MatrixLayoutDestroy, missing);
  Find(library, "cublasLtMatmulPreferenceCreate", api.MatmulPreferenceCreate, missing);
  Find(library, "cublasLtMatmulPreferenceDestroy", api.MatmulPreferenceDestroy, missing);
  Find(library, "cublasLtMatmulPreferenceSetAttribute", api.MatmulPreferenceSetAttribute, missing);
  Find(library, "cublasLtMatmulAlgoGetHeuristic", api.MatmulAlgoGetHeuristic, missing);
  Find(library, "cublasLtMatmul", api.Matmul, missing);
  if (!missing.empty()) {
    return Status(StatusCode::kUnavailable, "device: cuBLASLt has no " + missing);
  }
  return api;
}

}  // namespace loraserve
