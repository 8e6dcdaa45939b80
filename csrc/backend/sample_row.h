// What one row of logits needs to become a token, and what comes of it.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace loraserve {

// Order: logit bias, penalties, banned tokens, mask; then temperature, top-k, top-p, min-p, draw.
// Logprobs are those of the raw logits, before all of it.
struct SampleRow {
  float temperature = 1.0f;         // 0 is greedy: the highest logit, the lowest id among equals
  int32_t top_k = 0;                // 0: off
  float top_p = 1.0f;               // 1: off
  float min_p = 0.0f;               // 0: off
  float repetition_penalty = 1.0f;  // over prompt and output, as CTRL (arXiv 1909.05858) does it
  float presence_penalty = 0.0f;    // over the output
  float frequency_penalty = 0.0f;   // over the output
  uint64_t seed = 0;
  uint64_t position = 0;  // of the token to draw; seed and position alone decide the draw
  int32_t num_top_logprobs = 0;
  bool want_logprob = false;
  int32_t forced_token = -1;  // >= 0: no draw, only this token's logprob (prompt logprobs)

  std::span<const int32_t> prompt;
  std::span<const int32_t> output;
  std::span<const std::pair<int32_t, float>> logit_bias;
  std::span<const int32_t> banned;  // never drawn (end tokens before min_tokens)
  std::span<const uint32_t> mask;   // bit t of word t / 32 allows token t; empty allows all
};

struct SampleResult {
  int32_t token = 0;
  float logprob = 0;
  std::vector<std::pair<int32_t, float>> top_logprobs;  // descending
};

}  // namespace loraserve
