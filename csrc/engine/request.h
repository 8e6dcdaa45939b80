// What a caller asks of the engine, and what it gets back.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "lora/residency.h"

namespace loraserve {

using RequestId = uint64_t;

// Meanings and order as in backend/sample_row.h.
struct SamplingParams {
  int32_t max_tokens = 16;
  int32_t min_tokens = 0;  // resumed ones count
  float temperature = 1.0f;
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  uint64_t seed = 0;
  std::vector<std::pair<int32_t, float>> logit_bias;
  std::vector<int32_t> stop_token_ids;  // end tokens of the model among them; unless ignore_eos
  int32_t logprobs = -1;                // -1: none; n: of the chosen token and the n likeliest
  bool prompt_logprobs = false;         // likewise, of each prompt token given those before it
};

struct Request {
  RequestId id = 0;
  std::vector<int32_t> prompt;
  // The last so many tokens of `prompt` are of an earlier attempt. Penalties and min_tokens count
  // them as output, max_tokens does not; a resumed request goes on as if never interrupted.
  int32_t resumed_tokens = 0;
  SamplingParams params;
  AdapterId adapter = 0;
  std::string cache_namespace;  // prefixes are shared within it only
  int32_t priority = 0;         // higher goes first, within the bound of scheduler.h
  double deadline = 0;          // seconds on the engine's clock; 0: none
  double submitted = 0;         // likewise
};

enum class FinishReason : uint8_t { kNone, kLength, kStop, kCancelled, kError };

// New tokens of one request. `first_index` counts generated tokens from 0.
struct Output {
  RequestId id = 0;
  int32_t first_index = 0;
  std::vector<int32_t> token_ids;
  std::vector<float> logprobs;  // one for each token if asked for
  std::vector<std::vector<std::pair<int32_t, float>>> top_logprobs;
  // With the first token: of prompt[1:], and the likeliest at each of its positions if asked for.
  std::vector<float> prompt_logprobs;
  std::vector<std::vector<std::pair<int32_t, float>>> prompt_top_logprobs;
  FinishReason finish_reason = FinishReason::kNone;
  Status error;               // with kError
  int32_t cached_tokens = 0;  // of the prompt, found in the prefix cache
  // With the request's first output only: from its submission to the start of the first step that
  // ran it, or to its end if none did.
  double queue_seconds = 0;
};

}  // namespace loraserve
