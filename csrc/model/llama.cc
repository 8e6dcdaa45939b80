#include "model/llama.h"

#include <algorithm>
#include <array>

#include "base/check.h"

namespace loraserve {

namespace {

std::vector<float> ToFloats(const HostMatrix& vector) {
  std::vector<float> values(static_cast<size_t>(vector.rows * vector.cols));
  for (size_t i = 0; i < values.size(); ++i) values[i] = vector.at(0, static_cast<int64_t>(i));
  return values;
}

// Columns [begin, begin + count) of t.
Tensor Columns(Backend& backend, const Tensor& t, int64_t begin, int64_t count) {
  const int64_t offset = begin * BytesOf(backend.activation_dtype());
  return {static_cast<std::byte*>(t.data) + offset, t.rows, count, t.stride};
}

// Keeps the first failure; afterwards `Into` does nothing.
struct Loading {
  Status status;
  template <class T, class U>
  void Into(std::unique_ptr<T>& to, Result<std::unique_ptr<U>> from) {
    if (!status.ok()) return;
    if (from.ok()) {
      to = std::move(from.value());
    } else {
      status = from.status();
    }
  }
};

}  // namespace

Result<std::unique_ptr<LlamaModel>> LlamaModel::Create(Backend* backend, const ModelConfig& config,
                                                       const ModelWeights& weights, DType dtype,
                                                       int64_t max_rows, int64_t max_logit_rows) {
  std::unique_ptr<LlamaModel> model(new LlamaModel(backend, config));
  Status status = model->Prepare(weights, dtype);
  if (status.ok()) status = model->AllocateActivations(max_rows, max_logit_rows);
  if (!status.ok()) return status;
  model->PlanProducts();
  return model;
}

Status LlamaModel::Prepare(const ModelWeights& weights, DType dtype) {
  Loading loading;
  loading.Into(embedding_, backend_->PrepareWeight({&weights.embed_tokens, 1}, {}, dtype));
  if (weights.lm_head) {
    loading.Into(lm_head_, backend_->PrepareWeight({&*weights.lm_head, 1}, {}, dtype));
  }
  loading.Into(final_norm_, backend_->PrepareVector(ToFloats(weights.final_norm)));
  if (!loading.status.ok()) return loading.status;
  weight_bytes_ += embedding_->bytes() + (lm_head_ ? lm_head_->bytes() : 0);
  for (const LayerWeights& layer : weights.layers) {
    const Status status = PrepareLayer(layer, dtype);
    if (!status.ok()) return status;
  }
  return Status();
}

Status LlamaModel::PrepareLayer(const LayerWeights& w, DType dtype) {
  Layer layer;
  Loading loading;
  loading.Into(layer.input_norm, backend_->PrepareVector(ToFloats(w.input_norm)));
  loading.Into(layer.post_norm, backend_->PrepareVector(ToFloats(w.post_norm)));
  if (w.q_norm) {
    loading.Into(layer.q_norm, backend_->PrepareVector(ToFloats(*w.q_norm)));
    loading.Into(layer.k_norm, backend_->PrepareVector(ToFloats(*w.k_norm)));
  }
  std::vector<float> bias;
  if (w.q_bias) {
    for (const HostMatrix* part : {&*w.q_bias, &*w.k_bias, &*w.v_bias}) {
      const std::vector<float> values = ToFloats(*part);
      bias.insert(bias.end(), values.begin(), values.end());
    }
  }
  // Layers that share their input become one product: one pass over x.
  const std::array<HostMatrix, 3> qkv = {w.q, w.k, w.v};
  const std::array<HostMatrix, 2> gate_up = {w.gate, w.up};
  loading.Into(layer.qkv, backend_->PrepareWeight(qkv, std::move(bias), dtype));
  loading.Into(layer.o, backend_->PrepareWeight({&w.o, 1}, {}, dtype));
  loading.Into(layer.gate_up, backend_->PrepareWeight(gate_up, {}, dtype));
  loading.Into(layer.down, backend_->PrepareWeight({&w.down, 1}, {}, dtype));
  if (!loading.status.ok()) return loading.status;
  for (const auto* part : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
    weight_bytes_ += (*part)->bytes();
  }
  layers_.push_back(std::move(layer));
  return Status();
}

Status LlamaModel::AllocateActivations(int64_t max_rows, int64_t max_logit_rows) {
  max_rows_ = max_rows;
  max_logit_rows_ = max_logit_rows;
  Loading loading;
  const auto allocate = [&](Activation& activation, int64_t rows, int64_t cols) {
    activation.cols = cols;
    activation.stride = backend_->RowStride(cols);
    loading.Into(activation.buffer,
                 backend_->Allocate(static_cast<uint64_t>(rows * activation.stride *
                                                          BytesOf(backend_->activation_dtype()))));
  };
  allocate(hidden_, max_rows, config_.hidden_size);
  allocate(normed_, max_rows, config_.hidden_size);
  allocate(qkv_, max_rows, config_.q_size() + 2 * config_.kv_size());
  allocate(attention_, max_rows, config_.q_size());
  allocate(gate_up_, max_rows, 2 * config_.intermediate_size);
  allocate(product_, max_rows, config_.intermediate_size);
  allocate(gathered_, max_logit_rows, config_.hidden_size);
  allocate(logits_, max_logit_rows, config_.vocab_size);
  return loading.status;
}

void LlamaModel::PlanProducts() {
  const auto plan = [this](const PreparedWeight& weight, const Activation& x, const Activation& y,
                           bool accumulate, int64_t max_rows) {
    backend_->PlanGemm(weight, x.stride, y.stride, accumulate, max_rows);
  };
  for (const Layer& layer : layers_) {
    plan(*layer.qkv, normed_, qkv_, false, max_rows_);
    plan(*layer.o, attention_, hidden_, true, max_rows_);
    plan(*layer.gate_up, normed_, gate_up_, false, max_rows_);
    plan(*layer.down, product_, hidden_, true, max_rows_);
  }
  plan(lm_head_ ? *lm_head_ : *embedding_, gathered_, logits_, false, max_logit_rows_);
}

void LlamaModel::Forward(Stream* stream, int64_t rows) {
  backend_->RunStep(stream, rows, max_rows_, [this, stream](int64_t count) {
    backend_->Embed(stream, *embedding_, hidden_.View(count));
    for (int layer = 0; layer < config_.num_layers; ++layer) RunLayer(stream, layer, count);
  });
}

void LlamaModel::RunLayer(Stream* stream, int index, int64_t rows) {
  const Layer& layer = layers_[static_cast<size_t>(index)];
  const Tensor hidden = hidden_.View(rows);
  const Tensor normed = normed_.View(rows);
  const Tensor qkv = qkv_.View(rows);
  const Tensor attention = attention_.View(rows);
  const Tensor gate_up = gate_up_.View(rows);
  const Tensor product = product_.View(rows);
  const int64_t q = config_.q_size();
  const int64_t kv = config_.kv_size();
  const LoraTarget qkv_targets[] = {{index, LinearModule::kQ, 0},
                                    {index, LinearModule::kK, q},
                                    {index, LinearModule::kV, q + kv}};
  const LoraTarget o_target[] = {{index, LinearModule::kO, 0}};
  const LoraTarget gate_up_targets[] = {{index, LinearModule::kGate, 0},
                                        {index, LinearModule::kUp, config_.intermediate_size}};
  const LoraTarget down_target[] = {{index, LinearModule::kDown, 0}};

  backend_->RmsNorm(stream, hidden, *layer.input_norm, hidden.cols, config_.rms_norm_eps, normed);
  backend_->Gemm(stream, normed, *layer.qkv, false, qkv);
  backend_->Lora(stream, normed, qkv_targets, qkv);
  if (layer.q_norm) {
    const Tensor queries = Columns(*backend_, qkv, 0, q);
    const Tensor keys = Columns(*backend_, qkv, q, kv);
    backend_->RmsNorm(stream, queries, *layer.q_norm, config_.head_dim, config_.rms_norm_eps,
                      queries);
    backend_->RmsNorm(stream, keys, *layer.k_norm, config_.head_dim, config_.rms_norm_eps, keys);
  }
  backend_->RopeAndStoreKv(stream, index, qkv);
  backend_->PagedAttention(stream, index, qkv, config_.windows[static_cast<size_t>(index)],
                           attention);
  backend_->Gemm(stream, attention, *layer.o, true, hidden);
  backend_->Lora(stream, attention, o_target, hidden);

  backend_->RmsNorm(stream, hidden, *layer.post_norm, hidden.cols, config_.rms_norm_eps, normed);
  backend_->Gemm(stream, normed, *layer.gate_up, false, gate_up);
  backend_->Lora(stream, normed, gate_up_targets, gate_up);
  backend_->SiluMul(stream, gate_up, product);
  backend_->Gemm(stream, product, *layer.down, true, hidden);
  backend_->Lora(stream, product, down_target, hidden);
}

Tensor LlamaModel::Logits(Stream* stream, std::span<const int32_t> rows) {
  const auto count = static_cast<int64_t>(rows.size());
  const Tensor gathered = gathered_.View(count);
  const int64_t padded = backend_->PaddedRows(count, max_logit_rows_);
  // Row indices are below the rows of the last Forward.
  backend_->GatherRows(stream, hidden_.View(count), rows, gathered);
  backend_->RmsNorm(stream, gathered, *final_norm_, gathered.cols, config_.rms_norm_eps, gathered);
  backend_->Gemm(stream, gathered_.View(padded), lm_head_ ? *lm_head_ : *embedding_, false,
                 logits_.View(padded));
  return logits_.View(count);
}

}  // namespace loraserve
