// A checkpoint's tensors by role: views into host memory that must live while the model is built.
#pragma once

#include <optional>
#include <vector>

#include "base/dtype.h"

namespace loraserve {

struct LayerWeights {
  HostMatrix input_norm, post_norm;                  // [1, hidden]
  HostMatrix q, k, v, o, gate, up, down;             // [out, in]
  std::optional<HostMatrix> q_bias, k_bias, v_bias;  // [1, out]; all three or none
  std::optional<HostMatrix> q_norm, k_norm;          // [1, head_dim]; both or none
};

struct ModelWeights {
  HostMatrix embed_tokens;            // [vocab, hidden]
  HostMatrix final_norm;              // [1, hidden]
  std::optional<HostMatrix> lm_head;  // [vocab, hidden]; none when tied to embed_tokens
  std::vector<LayerWeights> layers;
};

}  // namespace loraserve
