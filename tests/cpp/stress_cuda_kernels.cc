// The CUDA kernels on the CPU under the sanitizers: random mixes of ranks, segments, sequences and
// sampling, in memory that ends where each buffer ends. Argument: rounds.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "base/check.h"

namespace loraserve {
namespace {

using Random = std::mt19937;

int Pick(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

std::vector<uint16_t> Values(Random& random, int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> out(static_cast<size_t>(count));
  for (uint16_t& value : out) value = F32ToBF16(normal(random));
  return out;
}

struct Activation {
  std::unique_ptr<Buffer> buffer;
  Tensor tensor;
};

Activation Upload(Backend& backend, const std::vector<uint16_t>& values, int64_t rows,
                  int64_t cols) {
  Activation out;
  const int64_t stride = backend.RowStride(cols);
  const auto bytes = static_cast<uint64_t>(rows * stride) * sizeof(uint16_t);
  std::vector<uint16_t> padded(static_cast<size_t>(rows * stride), 0x7fc0);  // NaN
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(values.data() + row * cols, cols, padded.data() + row * stride);
  }
  out.buffer = std::move(backend.Allocate(bytes).value());
  out.tensor = {out.buffer->data(), rows, cols, stride};
  backend.CopyToDevice(nullptr, padded.data(), out.tensor.data, bytes);
  backend.Synchronize(nullptr);
  return out;
}

std::vector<uint16_t> Download(Backend& backend, const Tensor& t) {
  std::vector<uint16_t> out(static_cast<size_t>(t.rows * t.stride));
  backend.CopyToHost(nullptr, t.data, out.data(), out.size() * sizeof(uint16_t));
  backend.Synchronize(nullptr);
  return out;
}

struct OwnedAdapter {
  std::vector<uint16_t> a, b;
  AdapterSource source;
  std::unique_ptr<InstalledAdapter> installed;
};

// One module of mixed ranks against sums in double.
void StressLora(Backend& backend, Random& random) {
  const int in = Pick(random, 1, 40) * (random() % 2 == 0 ? 8 : 33);
  const int out = Pick(random, 1, 600);
  KvLayout layout{.num_layers = 1,
                  .num_heads = 1,
                  .num_kv_heads = 1,
                  .head_dim = 16,
                  .block_size = 16,
                  .page_bytes = 4096u << Pick(random, 0, 3)};
  layout.tile_bytes = backend.KvTileBytes(layout);
  layout.tiles_per_page = static_cast<int>(layout.page_bytes / layout.tile_bytes);
  layout.pages_per_block = 1;
  const std::vector<float> frequencies(8, 1.0f);
  LS_CHECK(backend.BindPages(layout, 1, frequencies).ok());
  std::vector<OwnedAdapter> adapters(static_cast<size_t>(Pick(random, 1, 6)));
  uint32_t pages = 0;
  for (OwnedAdapter& adapter : adapters) {
    const int rank = random() % 8 == 0 ? Pick(random, 100, 300) : Pick(random, 1, 40);
    adapter.a = Values(random, int64_t{rank} * in);
    adapter.b = Values(random, int64_t{rank} * out);
    adapter.source.modules.push_back({.rank = rank,
                                      .scaling = 1.0f / static_cast<float>(rank),
                                      .a = {adapter.a.data(), DType::kBF16, rank, in},
                                      .b = {adapter.b.data(), DType::kBF16, rank, out}});
    pages += backend.AdapterPages(adapter.source);
  }
  LS_CHECK(backend.BindPages(layout, pages, frequencies).ok());
  for (OwnedAdapter& adapter : adapters) {
    std::vector<PageId> own;
    for (uint32_t i = backend.AdapterPages(adapter.source); i > 0; --i) own.push_back(--pages);
    adapter.installed = std::move(backend.InstallAdapter(adapter.source, own).value());
  }
  std::vector<LoraSegment> segments;
  std::vector<size_t> owners;
  int32_t rows = 0;
  for (int i = Pick(random, 0, 8); i > 0; --i) {
    rows += Pick(random, 0, 2);
    const int32_t count = random() % 4 == 0 ? Pick(random, 9, 70) : Pick(random, 1, 8);
    owners.push_back(random() % adapters.size());
    segments.push_back({rows, count, adapters[owners.back()].installed.get()});
    rows += count;
  }
  rows += 1;
  const std::vector<uint16_t> x = Values(random, int64_t{rows} * in);
  const std::vector<uint16_t> y = Values(random, int64_t{rows} * out);
  const Activation input = Upload(backend, x, rows, in);
  const Activation output = Upload(backend, y, rows, out);
  const LoraTarget target{0, LinearModule::kQ, 0};
  backend.BeginStep(nullptr, {.segments = segments});
  backend.Lora(nullptr, input.tensor, {&target, 1}, output.tensor);
  const std::vector<uint16_t> found = Download(backend, output.tensor);
  const auto at = [](const std::vector<uint16_t>& values, int64_t i) {
    return static_cast<double>(BF16ToF32(values[static_cast<size_t>(i)]));
  };
  std::vector<double> expected(y.size());
  for (size_t i = 0; i < y.size(); ++i) expected[i] = at(y, static_cast<int64_t>(i));
  for (size_t s = 0; s < segments.size(); ++s) {
    const OwnedAdapter& adapter = adapters[owners[s]];
    const AdapterModuleSource& module = adapter.source.modules[0];
    for (int32_t i = 0; i < segments[s].row_count; ++i) {
      const int64_t row = segments[s].row_begin + i;
      for (int64_t r = 0; r < module.rank; ++r) {
        double h = 0.0;
        for (int64_t k = 0; k < in; ++k) h += at(x, row * in + k) * at(adapter.a, r * in + k);
        h *= static_cast<double>(module.scaling);
        for (int64_t n = 0; n < out; ++n) {
          expected[static_cast<size_t>(row * out + n)] += h * at(adapter.b, r * out + n);
        }
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < out; ++n) {
      const double want = expected[static_cast<size_t>(row * out + n)];
      const double error = std::abs(at(found, row * output.tensor.stride + n) - want);
      LS_CHECK(error <= 0.01 * std::abs(want) + 0.005 * std::sqrt(static_cast<double>(in)));
    }
  }
}

// Sequences in steps of many lengths; the numbers are tested elsewhere.
void StressAttention(Backend& backend, Random& random) {
  const int kv_heads = Pick(random, 1, 3);
  KvLayout layout{.num_layers = 2,
                  .num_heads = kv_heads * Pick(random, 1, 20),
                  .num_kv_heads = kv_heads,
                  .head_dim = 8 * Pick(random, 1, 16),
                  .block_size = 16 * Pick(random, 1, 3)};
  layout.tile_bytes = backend.KvTileBytes(layout);
  layout.page_bytes = 4096;
  while (layout.page_bytes < layout.tile_bytes) layout.page_bytes *= 2;
  layout.tiles_per_page = static_cast<int>(layout.page_bytes / layout.tile_bytes);
  layout.pages_per_block = (4 + layout.tiles_per_page - 1) / layout.tiles_per_page;
  std::vector<SequenceSpan> sequences;
  std::vector<int32_t> positions;
  std::vector<PageId> pages;
  for (int i = Pick(random, 1, 4); i > 0; --i) {
    const int32_t count = random() % 2 == 0 ? 1 : Pick(random, 2, 70);
    const int32_t context = count + Pick(random, 0, 100);
    sequences.push_back({static_cast<int32_t>(positions.size()), count, context,
                         static_cast<int32_t>(pages.size())});
    for (int32_t row = 0; row < count; ++row) positions.push_back(context - count + row);
    const int blocks = (context + layout.block_size - 1) / layout.block_size;
    for (int page = blocks * layout.pages_per_block; page > 0; --page) {
      pages.push_back(static_cast<PageId>(pages.size()));
    }
  }
  std::shuffle(pages.begin(), pages.end(), random);
  const std::vector<float> frequencies(static_cast<size_t>(layout.head_dim / 2), 0.5f);
  LS_CHECK(backend.BindPages(layout, static_cast<uint32_t>(pages.size()), frequencies).ok());
  const auto rows = static_cast<int64_t>(positions.size());
  const int64_t width = int64_t{layout.num_heads + 2 * kv_heads} * layout.head_dim;
  const Activation qkv = Upload(backend, Values(random, rows * width), rows, width);
  const int64_t y_width = int64_t{layout.num_heads} * layout.head_dim;
  const Activation y = Upload(backend, Values(random, rows * y_width), rows, y_width);
  backend.BeginStep(nullptr, {.token_ids = positions,
                              .positions = positions,
                              .sequences = sequences,
                              .block_pages = pages});
  backend.RopeAndStoreKv(nullptr, 1, qkv.tensor);
  backend.PagedAttention(nullptr, 1, qkv.tensor, random() % 2 == 0 ? 0 : Pick(random, 1, 40),
                         y.tensor);
  backend.Synchronize(nullptr);
}

void StressSampling(Backend& backend, Random& random) {
  const int64_t rows = Pick(random, 1, 6);
  const int64_t vocab = Pick(random, 1, 3000);
  const Activation logits = Upload(backend, Values(random, rows * vocab), rows, vocab);
  const auto token = [&] { return Pick(random, 0, static_cast<int>(vocab) - 1); };
  const std::vector<int32_t> seen = {token(), token(), token()};
  const std::vector<std::pair<int32_t, float>> bias = {{token(), 2.0f}, {token(), -3.0f}};
  const std::vector<uint32_t> mask(static_cast<size_t>(vocab + 31) / 32, 0xffff00ffu);
  std::vector<SampleRow> wanted(static_cast<size_t>(rows));
  for (SampleRow& row : wanted) {
    row.seed = random();
    row.temperature = static_cast<float>(Pick(random, 0, 2));
    row.top_k = Pick(random, 0, 50);
    row.top_p = random() % 2 == 0 ? 1.0f : 0.7f;
    row.min_p = random() % 2 == 0 ? 0.0f : 0.1f;
    row.want_logprob = random() % 2 == 0;
    row.num_top_logprobs = Pick(random, 0, 4);
    row.banned = seen;
    row.logit_bias = bias;
    if (random() % 2 == 0) {
      row.output = seen;
      row.prompt = seen;
      row.presence_penalty = 0.5f;
      row.repetition_penalty = 1.2f;
      row.mask = mask;
    }
  }
  std::vector<SampleResult> results(wanted.size());
  backend.Sample(nullptr, logits.tensor, wanted, results);
  for (const SampleResult& result : results) LS_CHECK(result.token >= 0 && result.token < vocab);
}

}  // namespace
}  // namespace loraserve

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  auto backend = loraserve::CudaBackend::Create();
  LS_CHECK(backend.ok());
  loraserve::Random random(7);
  for (int round = 0; round < rounds; ++round) {
    loraserve::StressLora(*backend.value(), random);
    loraserve::StressAttention(*backend.value(), random);
    loraserve::StressSampling(*backend.value(), random);
  }
  std::printf("cuda kernels: %d rounds\n", rounds);
}
