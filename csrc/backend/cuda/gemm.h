// y = x W^T by the base model's weights, through cuBLASLt.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "backend/backend.h"
#include "backend/cuda/platform.h"

namespace loraserve {

// x [rows, k], weight [n, k] and y [rows, n] in bfloat16, sums in float32; y is added to if
// `accumulate`. Leading dimensions are in elements, multiples of 8.
struct GemmShape {
  int64_t rows = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t x_stride = 0;
  int64_t weight_stride = 0;
  int64_t y_stride = 0;
  bool accumulate = false;

  auto operator<=>(const GemmShape&) const = default;
};

class GemmLibrary {
 public:
  virtual ~GemmLibrary() = default;
  virtual std::string version() const = 0;
  // Chooses how Run does a shape, once. Run does so itself where it was not asked before.
  virtual void Plan(const GemmShape& shape) = 0;
  virtual void Run(cudaStream_t stream, const GemmShape& shape, const uint16_t* x,
                   const uint16_t* weight, uint16_t* y) = 0;

  // Opens the library; kUnavailable, with where it was looked for, if there is none.
  static Result<std::unique_ptr<GemmLibrary>> Open();
};

}  // namespace loraserve
