// Element types of weights, and their exact conversions to float32.
#pragma once

#include <bit>
#include <cstdint>

namespace loraserve {

enum class DType : uint8_t { kF32, kF16, kBF16 };

inline int64_t BytesOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

inline float BF16ToF32(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
inline uint16_t F32ToBF16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE 754 binary16 to binary32, subnormals and NaN payloads included.
inline float F16ToF32(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) {
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  }
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

// A row-major [rows, cols] matrix in host memory. Does not own; a vector has one row.
struct HostMatrix {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;

  float at(int64_t row, int64_t col) const {
    const int64_t i = row * cols + col;
    switch (dtype) {
      case DType::kF32:
        return static_cast<const float*>(data)[i];
      case DType::kF16:
        return F16ToF32(static_cast<const uint16_t*>(data)[i]);
      case DType::kBF16:
        return BF16ToF32(static_cast<const uint16_t*>(data)[i]);
    }
    return 0.0f;
  }
};

}  // namespace loraserve
