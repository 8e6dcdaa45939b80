#include "engine/validate.h"

#include <cmath>
#include <set>
#include <string>

namespace loraserve {

namespace {

Status Invalid(const std::string& message) { return Status(StatusCode::kInvalidArgument, message); }

Status CheckRange(const char* field, double value, double low, double high) {
  if (value >= low && value <= high) return Status();  // a NaN is in no range
  return Invalid(std::string(field) + ": " + std::to_string(value) + " is not in [" +
                 std::to_string(low) + ", " + std::to_string(high) + "]");
}

Status CheckToken(const char* field, int32_t token, const ModelConfig& model) {
  if (token >= 0 && token < model.vocab_size) return Status();
  return Invalid(std::string(field) + ": token id " + std::to_string(token) + " is not in [0, " +
                 std::to_string(model.vocab_size) + ")");
}

Status ValidateParams(const SamplingParams& p, int32_t resumed_tokens, const ModelConfig& model) {
  constexpr double kBig = 1e6;
  if (p.max_tokens < 1) {
    return Invalid("max_tokens: " + std::to_string(p.max_tokens) + ", must be at least 1");
  }
  // min_tokens is of the whole answer, max_tokens of what is to come.
  const int64_t whole = int64_t{resumed_tokens} + p.max_tokens;
  if (p.min_tokens < 0 || p.min_tokens > whole) {
    return Invalid("min_tokens: " + std::to_string(p.min_tokens) + " is not in [0, " +
                   std::to_string(whole) + "]");
  }
  if (p.top_k < 0) return Invalid("top_k: " + std::to_string(p.top_k) + ", must not be negative");
  for (const Status& status :
       {CheckRange("temperature", p.temperature, 0, 100), CheckRange("top_p", p.top_p, 1e-9, 1),
        CheckRange("min_p", p.min_p, 0, 1),
        CheckRange("repetition_penalty", p.repetition_penalty, 1e-3, 1e3),
        CheckRange("presence_penalty", p.presence_penalty, -100, 100),
        CheckRange("frequency_penalty", p.frequency_penalty, -100, 100),
        CheckRange("logprobs", p.logprobs, -1, kMaxTopLogprobs)}) {
    if (!status.ok()) return status;
  }
  // Below this the weights of close logits would all become 0 or infinite.
  if (p.temperature > 0 && p.temperature < 1e-4f) {
    return Invalid("temperature: below 0.0001; use 0 for greedy");
  }
  if (p.stop_token_ids.size() > kMaxStopTokens) {
    return Invalid("stop_token_ids: more than " + std::to_string(kMaxStopTokens));
  }
  for (int32_t token : p.stop_token_ids) {
    Status status = CheckToken("stop_token_ids", token, model);
    if (!status.ok()) return status;
  }
  if (p.logit_bias.size() > kMaxLogitBias) {
    return Invalid("logit_bias: more than " + std::to_string(kMaxLogitBias) + " entries");
  }
  for (const auto& [token, bias] : p.logit_bias) {
    Status status = CheckToken("logit_bias", token, model);
    if (status.ok()) status = CheckRange("logit_bias", bias, -kBig, kBig);
    if (!status.ok()) return status;
  }
  return Status();
}

}  // namespace

Status ValidateRequest(const Request& request, const ModelConfig& model) {
  if (request.prompt.empty()) return Invalid("prompt: is empty");
  for (int32_t token : request.prompt) {
    Status status = CheckToken("prompt", token, model);
    if (!status.ok()) return status;
  }
  if (request.prompt.size() >= static_cast<size_t>(model.max_position)) {
    return Invalid("prompt: " + std::to_string(request.prompt.size()) +
                   " tokens leave no room to answer in a context of " +
                   std::to_string(model.max_position));
  }
  if (request.resumed_tokens < 0 ||
      static_cast<size_t>(request.resumed_tokens) >= request.prompt.size()) {
    return Invalid("start_index: " + std::to_string(request.resumed_tokens) +
                   " resumed tokens, the prompt has " + std::to_string(request.prompt.size()));
  }
  return ValidateParams(request.params, request.resumed_tokens, model);
}

Status ValidateAdapterSource(const AdapterSource& source, const ModelConfig& model) {
  if (source.modules.empty()) return Invalid("adapter: changes no module");
  std::set<std::pair<int, LinearModule>> seen;
  for (const AdapterModuleSource& m : source.modules) {
    const std::string name = "layer " + std::to_string(m.layer) + " " +
                             std::string(kLinearModuleNames[static_cast<size_t>(m.module)]);
    if (m.rank < 1 || m.rank > kMaxRank) {
      return Status(StatusCode::kFailedPrecondition, "rank: " + std::to_string(m.rank) + " of " +
                                                         name + " is not in [1, " +
                                                         std::to_string(kMaxRank) + "]");
    }
    if (m.a.rows != m.rank || m.b.rows != m.rank || m.a.data == nullptr || m.b.data == nullptr) {
      return Invalid("adapter: rank and shapes of " + name + " disagree");
    }
    if (!std::isfinite(m.scaling)) return Invalid("scaling: of " + name + " is not finite");
    if (!seen.emplace(m.layer, m.module).second) return Invalid("adapter: " + name + " twice");
    if (m.layer < 0 || m.layer >= model.num_layers) {
      return Status(StatusCode::kFailedPrecondition,
                    "base: the adapter changes " + name + ", the model has " +
                        std::to_string(model.num_layers) + " layers");
    }
    int64_t in = model.hidden_size;
    int64_t out = model.hidden_size;
    switch (m.module) {
      case LinearModule::kQ:
        out = model.q_size();
        break;
      case LinearModule::kK:
      case LinearModule::kV:
        out = model.kv_size();
        break;
      case LinearModule::kO:
        in = model.q_size();
        break;
      case LinearModule::kGate:
      case LinearModule::kUp:
        out = model.intermediate_size;
        break;
      case LinearModule::kDown:
        in = model.intermediate_size;
        break;
    }
    if (m.a.cols != in || m.b.cols != out) {
      return Status(StatusCode::kFailedPrecondition,
                    "base: " + name + " of the adapter is [" + std::to_string(m.a.cols) + " -> " +
                        std::to_string(m.b.cols) + "], of the model [" + std::to_string(in) +
                        " -> " + std::to_string(out) + "]");
    }
  }
  return Status();
}

}  // namespace loraserve
