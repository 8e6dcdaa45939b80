// Checks of what callers hand over, before it reaches the scheduler. Pure functions.
#pragma once

#include "backend/adapter_source.h"
#include "engine/request.h"
#include "model/model_config.h"

namespace loraserve {

inline constexpr int32_t kMaxTopLogprobs = 64;
inline constexpr size_t kMaxStopTokens = 256;
inline constexpr size_t kMaxLogitBias = 1024;

// kInvalidArgument "field: what is wrong and the limit".
Status ValidateRequest(const Request& request, const ModelConfig& model);

// kFailedPrecondition if layers, modules or shapes are not the model's; kInvalidArgument if ranks
// are out of range or shapes contradict each other.
Status ValidateAdapterSource(const AdapterSource& source, const ModelConfig& model);

}  // namespace loraserve
