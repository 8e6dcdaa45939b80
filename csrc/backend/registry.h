// Names to backends; the only way to one from outside this folder.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "backend/backend.h"

namespace loraserve {

struct BackendOptions {
  std::string device = "cpu";
  int threads = 0;  // 0: one for each core this process may use
  // Of installed adapters: kF32 or kBF16; none: bfloat16 stays so, the rest becomes float32.
  std::optional<DType> adapter_dtype;
  // That products with base weights read. CPU: kF32, the default, or kBF16; CUDA: kBF16.
  std::optional<DType> activation_dtype;
  std::string isa;  // CPU: the highest instruction set to use; empty: no limit
};

// kInvalidArgument, naming the option, for a device this build does not have or what it cannot do.
Result<std::unique_ptr<Backend>> CreateBackend(const BackendOptions& options);

}  // namespace loraserve
