// The shape of a Llama-family decoder. Read and checked in Python; here it is trusted.
#pragma once

#include <cstdint>
#include <vector>

namespace loraserve {

struct ModelConfig {
  int32_t vocab_size = 0;
  int32_t hidden_size = 0;
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t intermediate_size = 0;
  int32_t max_position = 0;  // context length, tokens
  float rms_norm_eps = 1e-5f;
  std::vector<float> inverse_frequencies;  // [head_dim / 2], any rope scaling applied
  std::vector<int32_t> windows;            // by layer: sliding window in tokens, 0 for none

  int32_t q_size() const { return num_heads * head_dim; }
  int32_t kv_size() const { return num_kv_heads * head_dim; }
};

}  // namespace loraserve
