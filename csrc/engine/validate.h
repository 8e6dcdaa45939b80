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

// kFailedPrecondition if layers or shapes are not the model's, or a rank is over kMaxRank;
// kInvalidArgument if what the source says of itself is contradictory.
Status ValidateAdapterSource(const AdapterSource& source, const ModelConfig& model);

}  // namespace loraserve
