// The forward pass of the Llama family: Llama, Mistral, Qwen2 and Qwen3 (dense).
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "model/model_config.h"
#include "model/weights.h"

namespace loraserve {

class LlamaModel {
 public:
  // Prepares every weight as `dtype` (kF32 or kBF16) and buffers for steps of up to `max_rows` rows
  // and `max_logit_rows` rows of logits. `backend` outlives the model; `weights` need not.
  static Result<std::unique_ptr<LlamaModel>> Create(Backend* backend, const ModelConfig& config,
                                                    const ModelWeights& weights, DType dtype,
                                                    int64_t max_rows, int64_t max_logit_rows);

  // Runs all layers over the step given to Backend::BeginStep. The hidden states stay inside until
  // the next call. REQUIRES: rows <= max_rows.
  void Forward(Stream* stream, int64_t rows);
  // Logits [rows.size(), vocab] of those rows of the last Forward; valid until the next call.
  // REQUIRES: rows.size() <= max_logit_rows.
  Tensor Logits(Stream* stream, std::span<const int32_t> rows);

  const ModelConfig& config() const { return config_; }
  int64_t weight_bytes() const { return weight_bytes_; }

 private:
  struct Layer {
    std::unique_ptr<Buffer> input_norm, post_norm, q_norm, k_norm;  // q_norm, k_norm: or null
    std::unique_ptr<PreparedWeight> qkv, o, gate_up, down;
  };
  struct Activation {
    std::unique_ptr<Buffer> buffer;
    int64_t cols = 0;
    int64_t stride = 0;
    Tensor View(int64_t rows) const { return {buffer->data(), rows, cols, stride}; }
  };

  LlamaModel(Backend* backend, const ModelConfig& config) : backend_(backend), config_(config) {}
  Status Prepare(const ModelWeights& weights, DType dtype);
  Status PrepareLayer(const LayerWeights& weights, DType dtype);
  Status AllocateActivations(int64_t max_rows, int64_t max_logit_rows);
  void PlanProducts();
  void RunLayer(Stream* stream, int layer, int64_t rows);

  Backend* backend_;
  ModelConfig config_;
  std::unique_ptr<PreparedWeight> embedding_;
  std::unique_ptr<PreparedWeight> lm_head_;  // null when tied
  std::unique_ptr<Buffer> final_norm_;
  std::vector<Layer> layers_;
  int64_t weight_bytes_ = 0;

  Activation hidden_, normed_, qkv_, attention_, gate_up_, product_, gathered_, logits_;
  int64_t max_rows_ = 0;
  int64_t max_logit_rows_ = 0;
};

}  // namespace loraserve
