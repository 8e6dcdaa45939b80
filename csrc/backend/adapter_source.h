// A packed adapter as the backends read it: views into host memory, nothing owned.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/dtype.h"

namespace loraserve {

// The linear modules of a decoder layer that an adapter may change, in canonical order.
enum class LinearModule : uint8_t { kQ, kK, kV, kO, kGate, kUp, kDown };
inline constexpr int kNumLinearModules = 7;
inline constexpr std::array<std::string_view, kNumLinearModules> kLinearModuleNames = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};

inline constexpr int kMaxRank = 512;

// One module's pair: y += scaling * (x A^T) B.
struct AdapterModuleSource {
  int layer = 0;
  LinearModule module = LinearModule::kQ;
  int rank = 0;
  float scaling = 0;
  HostMatrix a;  // [rank, in]
  HostMatrix b;  // [rank, out]: the transpose of PEFT's lora_B
};

struct AdapterSource {
  std::vector<AdapterModuleSource> modules;
};

}  // namespace loraserve
