#include <algorithm>
#include <bit>
#include <cmath>

#include "backend/cuda/sampler.h"
#include "backend/cuda/sampling_state.h"
#include "base/philox.h"

namespace loraserve {

namespace {

// The first token, likeliest first, at which the sum of weight(rank) reaches `target` >= 1: found
// a byte of the rank at a time. The total is at least `target`.
template <class Weight>
__device__ Mass Reach(Mass target, const uint32_t* keys, int32_t vocab, SharedState& s,
                      Weight&& weight) {
  Mass prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) s.bins[i] = 0;
    __syncthreads();
    for (auto token = static_cast<int32_t>(threadIdx.x); token < vocab;
         token += static_cast<int32_t>(blockDim.x)) {
      const Mass rank = RankOf(keys[token], token);
      if (shift < 56 && (rank >> (shift + 8)) != (prefix >> (shift + 8))) continue;
      const Mass w = weight(rank);
      if (w != 0) atomicAdd(&s.bins[(rank >> shift) & 255], w);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Mass left = target;
      int bin = 255;
      while (bin > 0 && s.bins[bin] < left) left -= s.bins[bin--];
      s.rank = prefix | Mass{static_cast<uint32_t>(bin)} << shift;
      s.left = left;
    }
    __syncthreads();
    prefix = s.rank;
    target = s.left;
  }
  return prefix;
}

// Bias, penalties, bans and the mask, in this order; then keys.
__device__ void MakeKeys(const RowParams& p, const uint16_t* logits, int32_t vocab, uint32_t* keys,
                         uint32_t* counts) {
  const auto first = static_cast<int32_t>(threadIdx.x);
  const auto threads = static_cast<int32_t>(blockDim.x);
  if (p.adjusts == 0) {
    for (int32_t i = first; i < vocab; i += threads) keys[i] = KeyOf(BF16Value(logits[i]));
    __syncthreads();
    return;
  }
  constexpr uint32_t kInPrompt = 0x80000000u;
  auto* const values = reinterpret_cast<float*>(keys);
  for (int32_t i = first; i < vocab; i += threads) {
    values[i] = BF16Value(logits[i]);
    counts[i] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {  // a token may be named twice
    for (int32_t i = 0; i < p.num_bias; ++i) values[p.bias[i].token] += p.bias[i].bias;
  }
  for (int32_t i = first; i < p.num_output; i += threads) atomicAdd(&counts[p.output[i]], 1u);
  for (int32_t i = first; i < p.num_prompt; i += threads) atomicOr(&counts[p.prompt[i]], kInPrompt);
  __syncthreads();
  for (int32_t i = first; i < vocab; i += threads) {
    float value = values[i];
    const uint32_t count = counts[i] & ~kInPrompt;
    if (counts[i] != 0 && p.repetition != 1.0f) {
      value = value > 0 ? value / p.repetition : value * p.repetition;
    }
    if (count != 0) value -= p.presence + p.frequency * static_cast<float>(count);
    if (p.mask != nullptr && (p.mask[i / 32] >> (i % 32) & 1u) == 0) value = -INFINITY;
    keys[i] = KeyOf(value);
  }
  __syncthreads();
  for (int32_t i = first; i < p.num_banned; i += threads) keys[p.banned[i]] = kNever;
  __syncthreads();
}

__device__ int32_t Draw(const RowParams& p, const uint32_t* keys, int32_t vocab, Mass best,
                        SharedState& s) {
  const float top = LogitOf(static_cast<uint32_t>(best >> 32));
  const float inverse = 1.0f / p.temperature;
  Mass threshold = 0;
  const bool by_rank = (p.top_k > 0 && p.top_k < vocab) || p.top_p < 1.0f;
  const auto weight = [&](Mass rank) -> Mass {
    if (rank < threshold) return 0;
    return static_cast<Mass>(expf((LogitOf(static_cast<uint32_t>(rank >> 32)) - top) * inverse) *
                             kOne);
  };
  const auto total = [&](auto&& of) {
    Mass sum = 0;
    for (auto i = static_cast<int32_t>(threadIdx.x); i < vocab;
         i += static_cast<int32_t>(blockDim.x)) {
      sum += of(RankOf(keys[i], i));
    }
    return BlockTotal(sum, s);
  };
  if (p.top_k > 0 && p.top_k < vocab) {
    threshold = Reach(static_cast<Mass>(p.top_k), keys, vocab, s, [](Mass) { return Mass{1}; });
  }
  if (p.top_p < 1.0f) {
    const Mass all = total(weight);
    const Mass wanted = static_cast<Mass>(static_cast<double>(p.top_p) * static_cast<double>(all));
    threshold = Reach(wanted < 1 ? 1 : wanted, keys, vocab, s, weight);
  }
  const auto least = static_cast<Mass>(p.min_p * kOne);
  const auto kept = [&](Mass rank) -> Mass {
    const Mass w = weight(rank);
    return w < least ? 0 : w;
  };
  const Mass all = total(kept);
  const auto target = static_cast<Mass>(p.uniform * static_cast<double>(all)) + 1;
  if (by_rank) return TokenOf(Reach(target < all ? target : all, keys, vocab, s, kept));

  // In the order of ids: each thread has a run of them.
  const auto threads = static_cast<int32_t>(blockDim.x);
  const int32_t run = (vocab + threads - 1) / threads;
  const int32_t begin = static_cast<int32_t>(threadIdx.x) * run;
  const int32_t end = begin + run < vocab ? begin + run : vocab;
  Mass own = 0;
  for (int32_t i = begin; i < end; ++i) own += kept(RankOf(keys[i], i));
  Mass before = own;  // inclusive, within the warp
  for (int step = 1; step < kWarp; step *= 2) {
    const Mass other = __shfl_up_sync(0xffffffffu, before, step);
    if (threadIdx.x % kWarp >= static_cast<unsigned>(step)) before += other;
  }
  __syncthreads();
  if (threadIdx.x % kWarp == kWarp - 1) s.value[threadIdx.x / kWarp] = before;
  __syncthreads();
  before -= own;
  for (unsigned w = 0; w < threadIdx.x / kWarp; ++w) before += s.value[w];
  const Mass wanted = target < all ? target : all;
  if (before < wanted && wanted <= before + own) {
    for (int32_t i = begin; i < end; ++i) {
      before += kept(RankOf(keys[i], i));
      if (before >= wanted) {
        s.rank = static_cast<Mass>(i);
        break;
      }
    }
  }
  __syncthreads();
  return static_cast<int32_t>(s.rank);
}

__global__ void SampleKernel(const RowParams* params, const uint16_t* logits, int64_t stride,
                             int32_t vocab, uint32_t* all_keys, uint32_t* all_counts, RowOut* out,
                             TopOut* top_out, int32_t max_top) {
  SharedState& s = *reinterpret_cast<SharedState*>(SharedMemory());
  const RowParams& p = params[blockIdx.x];
  const uint16_t* const row = logits + blockIdx.x * stride;
  uint32_t* const keys = all_keys + static_cast<int64_t>(blockIdx.x) * vocab;
  uint32_t* const counts = all_counts + static_cast<int64_t>(blockIdx.x) * vocab;
  const auto first = static_cast<int32_t>(threadIdx.x);
  const auto threads = static_cast<int32_t>(blockDim.x);
  int32_t token = p.forced;
  if (token < 0) {
    MakeKeys(p, row, vocab, keys, counts);
    Mass best = 0;
    for (int32_t i = first; i < vocab; i += threads) {
      const Mass rank = RankOf(keys[i], i);
      best = rank > best ? rank : best;
    }
    best = BlockMax(best, s);
    if (static_cast<uint32_t>(best >> 32) <= kNever) {
      token = 0;  // nothing may be drawn
    } else {
      token = p.temperature == 0.0f ? TokenOf(best) : Draw(p, keys, vocab, best, s);
    }
  }
  if (p.want_logprob == 0) {
    if (threadIdx.x == 0) out[blockIdx.x] = {token, 0.0f};
    return;
  }
  Mass best = 0;
  for (int32_t i = first; i < vocab; i += threads) {
    const Mass rank = RankOf(KeyOf(BF16Value(row[i])), i);
    best = rank > best ? rank : best;
  }
  best = BlockMax(best, s);
  const float top = LogitOf(static_cast<uint32_t>(best >> 32));
  float sum = 0.0f;
  for (int32_t i = first; i < vocab; i += threads) sum += expf(BF16Value(row[i]) - top);
  const float norm = top + logf(BlockSum(sum, s));
  if (threadIdx.x == 0) out[blockIdx.x] = {token, BF16Value(row[token]) - norm};
  Mass last = ~Mass{0};
  for (int32_t n = 0; n < p.num_top; ++n) {
    best = 0;
    for (int32_t i = first; i < vocab; i += threads) {
      const Mass rank = RankOf(KeyOf(BF16Value(row[i])), i);
      if (rank < last && rank > best) best = rank;
    }
    last = BlockMax(best, s);
    if (threadIdx.x == 0) {
      const int32_t id = TokenOf(last);
      top_out[static_cast<int64_t>(blockIdx.x) * max_top + n] = {id, BF16Value(row[id]) - norm};
    }
  }
}

bool Adjusts(const SampleRow& row) {
  return !row.logit_bias.empty() || !row.banned.empty() || !row.mask.empty() ||
         row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f ||
         row.frequency_penalty != 0.0f;
}

// Its tables are uploaded only where something reads them.
bool Counts(const SampleRow& row) {
  return row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f ||
         row.frequency_penalty != 0.0f;
}

template <class T, class From>
const T* AddTable(StagedTable& table, std::span<const From> values) {
  if (values.empty()) return nullptr;
  T* const host = table.Add<T>(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if constexpr (std::is_same_v<T, TokenBias>) {
      host[i] = {values[i].first, values[i].second};
    } else {
      host[i] = values[i];
    }
  }
  return table.device(host);
}

uint64_t TableBytes(std::span<const SampleRow> rows) {
  uint64_t bytes = rows.size() * (sizeof(RowParams) + 5 * 16) + 64;
  for (const SampleRow& row : rows) {
    bytes += row.prompt.size_bytes() + row.output.size_bytes() + row.banned.size_bytes() +
             row.logit_bias.size() * sizeof(TokenBias) + row.mask.size_bytes();
  }
  return bytes;
}

}  // namespace

CudaSampler::~CudaSampler() { LS_CUDA(cudaFreeHost(host_out_)); }

void CudaSampler::Sample(cudaStream_t stream, Tensor logits, std::span<const SampleRow> rows,
                         std::span<SampleResult> results) {
  if (rows.empty()) return;
  const auto vocab = static_cast<int32_t>(logits.cols);
  table_.Begin(TableBytes(rows), stream);
  RowParams* const params = table_.Add<RowParams>(rows.size());
  int32_t max_top = 0;
  bool adjusts = false;
  for (size_t i = 0; i < rows.size(); ++i) {
    const SampleRow& row = rows[i];
    const bool counts = Counts(row);
    const int32_t num_top = std::clamp(row.num_top_logprobs, 0, vocab);
    max_top = std::max(max_top, num_top);
    adjusts = adjusts || Adjusts(row);
    params[i] = {.temperature = row.temperature,
                 .top_p = row.top_p,
                 .min_p = row.min_p,
                 .repetition = row.repetition_penalty,
                 .presence = row.presence_penalty,
                 .frequency = row.frequency_penalty,
                 .top_k = row.top_k,
                 .num_top = num_top,
                 .want_logprob = row.want_logprob ? 1 : 0,
                 .forced = row.forced_token,
                 .uniform = PhiloxUniform(row.seed, row.position),
                 .adjusts = Adjusts(row) ? 1 : 0,
                 .num_prompt = counts ? static_cast<int32_t>(row.prompt.size()) : 0,
                 .num_output = counts ? static_cast<int32_t>(row.output.size()) : 0,
                 .num_bias = static_cast<int32_t>(row.logit_bias.size()),
                 .num_banned = static_cast<int32_t>(row.banned.size()),
                 .prompt = counts ? AddTable<int32_t>(table_, row.prompt) : nullptr,
                 .output = counts ? AddTable<int32_t>(table_, row.output) : nullptr,
                 .bias = AddTable<TokenBias>(table_, row.logit_bias),
                 .banned = AddTable<int32_t>(table_, row.banned),
                 .mask = AddTable<uint32_t>(table_, row.mask)};
  }
  table_.Commit(stream);
  const uint64_t cells = rows.size() * static_cast<uint64_t>(vocab);
  auto* const keys = static_cast<uint32_t*>(keys_.Reserve(cells * sizeof(uint32_t), stream));
  auto* const counts =
      static_cast<uint32_t*>(counts_.Reserve(adjusts ? cells * sizeof(uint32_t) : 0, stream));
  const uint64_t top_at = rows.size() * sizeof(RowOut);
  const uint64_t out_bytes = top_at + rows.size() * static_cast<uint64_t>(max_top) * sizeof(TopOut);
  auto* const out = static_cast<std::byte*>(out_.Reserve(out_bytes, stream));
  if (out_bytes > host_out_bytes_) {
    LS_CUDA(cudaFreeHost(host_out_));
    host_out_bytes_ = std::bit_ceil(out_bytes);
    LS_CUDA(cudaMallocHost(reinterpret_cast<void**>(&host_out_), host_out_bytes_));
  }
  const unsigned threads = vocab <= 2048 ? kWarp : 512;
  Launch(SampleKernel, dim3(static_cast<unsigned>(rows.size())), dim3(threads), sizeof(SharedState),
         stream, table_.device(params), static_cast<const uint16_t*>(logits.data), logits.stride,
         vocab, keys, counts, reinterpret_cast<RowOut*>(out),
         reinterpret_cast<TopOut*>(out + top_at), max_top);
  LS_CUDA(cudaMemcpyAsync(host_out_, out, out_bytes, cudaMemcpyDeviceToHost, stream));
  LS_CUDA(cudaStreamSynchronize(stream));
  const auto* const found = reinterpret_cast<const RowOut*>(host_out_);
  const auto* const top = reinterpret_cast<const TopOut*>(host_out_ + top_at);
  for (size_t i = 0; i < rows.size(); ++i) {
    results[i].token = found[i].token;
    results[i].logprob = found[i].logprob;
    results[i].top_logprobs.clear();
    if (!rows[i].want_logprob) continue;
    for (int32_t n = 0; n < params[i].num_top; ++n) {
      const TopOut& one = top[i * static_cast<size_t>(max_top) + static_cast<size_t>(n)];
      results[i].top_logprobs.emplace_back(one.token, one.logprob);
    }
  }
}

}  // namespace loraserve
