#include "backend/cpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/philox.h"

namespace loraserve {

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

bool Adjusts(const SampleRow& row) {
  return !row.logit_bias.empty() || !row.banned.empty() || !row.mask.empty() ||
         row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f ||
         row.frequency_penalty != 0.0f;
}

void Adjust(const SampleRow& row, std::vector<float>& logits, std::vector<int32_t>& counts) {
  for (const auto& [token, bias] : row.logit_bias) logits[static_cast<size_t>(token)] += bias;
  const auto repeat = [&](int32_t token) {
    float& logit = logits[static_cast<size_t>(token)];
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
  };
  counts.resize(logits.size(), 0);
  for (int32_t token : row.output) ++counts[static_cast<size_t>(token)];
  if (row.repetition_penalty != 1.0f) {
    // Each token once: a prompt token is marked by -1 where the output has none of it.
    for (int32_t token : row.prompt) {
      int32_t& count = counts[static_cast<size_t>(token)];
      if (count == 0) {
        repeat(token);
        count = -1;
      }
    }
  }
  for (int32_t token : row.output) {
    int32_t& count = counts[static_cast<size_t>(token)];
    if (count <= 0) continue;
    if (row.repetition_penalty != 1.0f) repeat(token);
    logits[static_cast<size_t>(token)] -=
        row.presence_penalty + row.frequency_penalty * static_cast<float>(count);
    count = 0;
  }
  for (int32_t token : row.prompt) counts[static_cast<size_t>(token)] = 0;
  for (int32_t token : row.banned) logits[static_cast<size_t>(token)] = kNever;
  if (!row.mask.empty()) {
    for (size_t token = 0; token < logits.size(); ++token) {
      if ((row.mask[token / 32] >> (token % 32) & 1u) == 0) logits[token] = kNever;
    }
  }
}

// A NaN counts as a logit that is never drawn.
float LogitOf(std::span<const float> logits, int32_t token) {
  const float logit = logits[static_cast<size_t>(token)];
  return std::isnan(logit) ? kNever : logit;
}

int32_t Greedy(std::span<const float> logits) {
  int32_t best = 0;
  for (int32_t token = 1; token < static_cast<int32_t>(logits.size()); ++token) {
    if (logits[static_cast<size_t>(token)] > LogitOf(logits, best)) best = token;
  }
  return best;
}

// Highest logit first, lower id first among equals: a total order, so equal rows draw alike.
struct ByLogit {
  std::span<const float> logits;
  bool operator()(int32_t a, int32_t b) const {
    const float x = LogitOf(logits, a);
    const float y = LogitOf(logits, b);
    return x != y ? x > y : a < b;
  }
};

int32_t Draw(const SampleRow& row, std::span<const float> logits, SamplerScratch& scratch) {
  std::vector<int32_t>& order = scratch.order;
  order.resize(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const ByLogit by_logit{logits};
  size_t kept = order.size();
  if (row.top_k > 0) kept = std::min(kept, static_cast<size_t>(row.top_k));
  if (kept < order.size()) {
    const auto end = order.begin() + static_cast<std::ptrdiff_t>(kept);
    std::partial_sort(order.begin(), end, order.end(), by_logit);
  } else if (row.top_p < 1.0f) {
    std::sort(order.begin(), order.end(), by_logit);
  }
  const bool sorted = kept < order.size() || row.top_p < 1.0f;
  const float top = LogitOf(logits, sorted ? order[0] : Greedy(logits));
  if (top == kNever) return 0;
  std::vector<double>& weights = scratch.weights;
  weights.resize(kept);
  double total = 0.0;
  for (size_t i = 0; i < kept; ++i) {
    weights[i] = std::exp((double{LogitOf(logits, order[i])} - top) / row.temperature);
    total += weights[i];
  }
  if (row.top_p < 1.0f) {  // the smallest set of the likeliest whose mass reaches top_p
    double mass = 0.0;
    size_t i = 0;
    while (i < kept) {
      mass += weights[i++];
      if (mass >= row.top_p * total) break;
    }
    kept = i;
  }
  if (row.min_p > 0.0f) {  // the likeliest has weight 1
    for (size_t i = 0; i < kept; ++i) {
      if (weights[i] < row.min_p) weights[i] = 0.0;
    }
  }
  total = 0.0;
  for (size_t i = 0; i < kept; ++i) total += weights[i];
  const double target = PhiloxUniform(row.seed, row.position) * total;
  double mass = 0.0;
  int32_t last = order[0];
  for (size_t i = 0; i < kept; ++i) {
    if (weights[i] == 0.0) continue;
    last = order[i];
    mass += weights[i];
    if (target < mass) break;
  }
  return last;
}

}  // namespace

SampleResult SampleToken(const CpuKernels& kernels, std::span<const float> logits,
                         const SampleRow& row, SamplerScratch& scratch) {
  SampleResult result;
  if (row.forced_token >= 0) {
    result.token = row.forced_token;
  } else {
    std::span<const float> adjusted = logits;
    if (Adjusts(row)) {
      scratch.logits.assign(logits.begin(), logits.end());
      Adjust(row, scratch.logits, scratch.counts);
      adjusted = scratch.logits;
    }
    result.token = row.temperature == 0.0f ? Greedy(adjusted) : Draw(row, adjusted, scratch);
  }
  if (!row.want_logprob) return result;
  const float norm = kernels.log_sum_exp(logits.data(), static_cast<int64_t>(logits.size()));
  result.logprob = logits[static_cast<size_t>(result.token)] - norm;
  const size_t top = std::min(static_cast<size_t>(row.num_top_logprobs), logits.size());
  if (top == 0) return result;
  std::vector<int32_t>& order = scratch.order;
  order.resize(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto end = order.begin() + static_cast<std::ptrdiff_t>(top);
  std::partial_sort(order.begin(), end, order.end(), ByLogit{logits});
  for (auto it = order.begin(); it != end; ++it) {
    result.top_logprobs.emplace_back(*it, logits[static_cast<size_t>(*it)] - norm);
  }
  return result;
}

}  // namespace loraserve
