#include <algorithm>
#include <bit>
#include <cstring>

#include "backend/cuda/adapter_installer.h"
#include "base/check.h"

namespace loraserve {

namespace {

// Of a slot: strips, then the data that they point into.
constexpr uint32_t kMaxStrips = 4096;
constexpr uint64_t kDataOffset = kMaxStrips * sizeof(InstallStrip);
constexpr uint64_t kDataBytes = 8 << 20;  // more than 8 rows of any model that is known

// Where the module is in a table [layers][modules].
size_t IndexOf(const AdapterModuleSource& module) {
  return static_cast<size_t>(module.layer) * kCudaLinearModules +
         static_cast<size_t>(module.module);
}

DeviceModule ShapeOf(const AdapterModuleSource& source) {
  DeviceModule shape;
  shape.rank = static_cast<uint32_t>(source.rank);
  shape.in_features = static_cast<uint32_t>(source.a.cols);
  shape.out_features = static_cast<uint32_t>(source.b.cols);
  shape.scaling = source.scaling;
  return shape;
}

}  // namespace

CudaAdapter::~CudaAdapter() {
  if (block_ != nullptr) cache_->Give(block_, block_bytes_);
}

uint64_t AdapterTiles(const AdapterSource& source) {
  uint64_t tiles = 0;
  for (const AdapterModuleSource& module : source.modules) tiles += ShapeOf(module).tiles();
  return tiles;
}

// Strips in the order of the tiles: of each module A, then B.
class AdapterInstaller::Install final : public AdapterInstall {
 public:
  Install(AdapterInstaller* installer, const AdapterSource& source,
          std::vector<DeviceModule> modules, std::unique_ptr<CudaAdapter> adapter)
      : installer_(installer),
        source_(source),
        modules_(std::move(modules)),
        adapter_(std::move(adapter)) {}

  // Given up: the pages are the caller's again only when nothing writes them any more, and the
  // source when nothing is copied from it; every copy has a kernel after it.
  ~Install() override { LS_CUDA(cudaStreamSynchronize(installer_->stream_)); }

  bool Write(uint64_t bytes) override {
    uint64_t written = 0;
    while (module_ < source_.modules.size() && written < bytes) {
      const AdapterModuleSource& from = source_.modules[module_];
      const DeviceModule& shape = modules_[IndexOf(from)];
      installer_->AddStrip(is_b_ ? from.b : from.a, is_b_, shape, tile_, adapter_->device());
      written += uint64_t{is_b_ ? shape.out_tiles() : shape.in_tiles()} * kTileBytes;
      if (++tile_ < shape.rank_tiles()) continue;
      tile_ = 0;
      if (is_b_) ++module_;
      is_b_ = !is_b_;
    }
    installer_->Flush(adapter_->device());
    return module_ < source_.modules.size();
  }

  std::unique_ptr<InstalledAdapter> Finish() override {
    LS_CUDA(cudaStreamSynchronize(installer_->stream_));
    return std::move(adapter_);
  }

 private:
  AdapterInstaller* installer_;
  AdapterSource source_;
  std::vector<DeviceModule> modules_;
  std::unique_ptr<CudaAdapter> adapter_;
  size_t module_ = 0;  // the next strip
  bool is_b_ = false;
  uint32_t tile_ = 0;
};

AdapterInstaller::AdapterInstaller(uint8_t* arena, uint64_t page_bytes, HostRegistry* registry)
    : arena_(arena), page_bytes_(page_bytes), registry_(registry) {
  LS_CUDA(cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking));
  LS_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  for (Slot& slot : slots_) {
    const uint64_t bytes = kDataOffset + kDataBytes;
    LS_CUDA(cudaMallocHost(reinterpret_cast<void**>(&slot.host), bytes));
    LS_CUDA(cudaMalloc(reinterpret_cast<void**>(&slot.device), bytes));
    LS_CUDA(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming));
    LS_CUDA(cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming));
  }
}

AdapterInstaller::~AdapterInstaller() {
  LS_CUDA(cudaStreamSynchronize(stream_));
  for (Slot& slot : slots_) {
    LS_CUDA(cudaEventDestroy(slot.copied));
    LS_CUDA(cudaEventDestroy(slot.done));
    LS_CUDA(cudaFreeHost(slot.host));
    LS_CUDA(cudaFree(slot.device));
  }
  LS_CUDA(cudaStreamDestroy(stream_));
  LS_CUDA(cudaStreamDestroy(copies_));
}

Result<std::unique_ptr<AdapterInstall>> AdapterInstaller::Start(const AdapterSource& source,
                                                                std::span<const PageId> pages,
                                                                cudaEvent_t steps) {
  auto adapter = std::make_unique<CudaAdapter>();
  for (const AdapterModuleSource& from : source.modules) {
    adapter->num_layers_ = std::max(adapter->num_layers_, static_cast<uint32_t>(from.layer) + 1);
  }
  std::vector<DeviceModule> modules(size_t{adapter->num_layers_} * kCudaLinearModules);
  uint32_t tile = 0;
  for (const AdapterModuleSource& from : source.modules) {
    DeviceModule& to = modules[IndexOf(from)];
    to = ShapeOf(from);
    if (uint64_t{kTileRanks} * std::max(to.in_features, to.out_features) * 4 > kDataBytes) {
      return Status(StatusCode::kInvalidArgument,
                    "adapter: a module of " + std::to_string(to.in_features) + " inputs and " +
                        std::to_string(to.out_features) + " outputs; the limit is " +
                        std::to_string(kDataBytes / kTileRanks / 4));
    }
    to.a_tile = tile;
    to.b_tile = tile + to.rank_tiles() * to.in_tiles();
    tile += to.tiles();
    adapter->weight_bytes_ += uint64_t{to.rank} * (to.in_features + to.out_features) * 2;
    DeviceModule& largest = adapter->largest_[static_cast<size_t>(from.module)];
    largest.rank = std::max(largest.rank, to.rank);
    largest.in_features = std::max(largest.in_features, to.in_features);
    largest.out_features = std::max(largest.out_features, to.out_features);
  }
  LS_CHECK(uint64_t{tile} * kTileBytes <= pages.size() * page_bytes_);
  LS_CUDA(cudaStreamWaitEvent(stream_, steps, 0));
  const Status status = WriteDescriptor(modules, pages, *adapter);
  if (!status.ok()) return status;
  return std::unique_ptr<AdapterInstall>(
      std::make_unique<Install>(this, source, std::move(modules), std::move(adapter)));
}

Status AdapterInstaller::WriteDescriptor(std::span<const DeviceModule> modules,
                                         std::span<const PageId> pages, CudaAdapter& adapter) {
  const uint64_t modules_at = sizeof(DeviceAdapter);
  const uint64_t pages_at = modules_at + modules.size_bytes();
  const uint64_t bytes = pages_at + pages.size() * sizeof(uint8_t*);
  adapter.block_ = cache_->Take(bytes);
  if (adapter.block_ == nullptr) {
    return Status(StatusCode::kResourceExhausted,
                  "adapter: no device memory for a table of " + std::to_string(bytes) + " bytes");
  }
  adapter.block_bytes_ = bytes;
  adapter.cache_ = cache_;
  adapter.device_ = static_cast<const DeviceAdapter*>(adapter.block_);
  auto* const block = static_cast<uint8_t*>(adapter.block_);
  descriptor_.Begin(bytes, stream_);
  auto* const host = descriptor_.Add<uint8_t>(bytes);
  const DeviceAdapter header{
      .modules = reinterpret_cast<const DeviceModule*>(block + modules_at),
      .pages = reinterpret_cast<uint8_t* const*>(block + pages_at),
      .num_layers = adapter.num_layers_,
      .tiles_per_page_shift = static_cast<uint32_t>(std::countr_zero(page_bytes_ / kTileBytes))};
  std::memcpy(host, &header, sizeof(header));
  std::memcpy(host + modules_at, modules.data(), modules.size_bytes());
  for (size_t i = 0; i < pages.size(); ++i) {
    uint8_t* const address = arena_ + pages[i] * page_bytes_;
    std::memcpy(host + pages_at + i * sizeof(address), &address, sizeof(address));
  }
  descriptor_.CommitTo(block, stream_);
  return Status();
}

void AdapterInstaller::AddStrip(const HostMatrix& matrix, bool is_b, const DeviceModule& shape,
                                uint32_t tile, const DeviceAdapter* adapter) {
  const auto row_bytes = static_cast<uint64_t>(matrix.cols * BytesOf(matrix.dtype));
  const uint32_t rows = std::min(kTileRanks, shape.rank - tile * kTileRanks);
  const uint64_t bytes = (rows * row_bytes + 15) / 16 * 16;
  if (slots_[current_].used + bytes > kDataBytes || slots_[current_].strips.size() == kMaxStrips) {
    Flush(adapter);
  }
  Slot& slot = slots_[current_];
  if (slot.strips.empty()) LS_CUDA(cudaEventSynchronize(slot.done));
  const auto* const source =
      static_cast<const std::byte*>(matrix.data) + tile * kTileRanks * row_bytes;
  const bool direct = registry_->Holds(source, rows * row_bytes);
  registry_->CountRead(direct, rows * row_bytes);
  Run run{.from = source, .to = slot.used, .bytes = rows * row_bytes};
  if (!direct) {
    std::byte* const staged = slot.host + kDataOffset + slot.used;
    std::memcpy(staged, source, rows * row_bytes);
    run.from = staged;
    run.bytes = bytes;  // what is between two strips goes along
  }
  Run* const last = slot.runs.empty() ? nullptr : &slot.runs.back();
  if (last != nullptr && last->from + last->bytes == run.from && last->to + last->bytes == run.to) {
    last->bytes += run.bytes;
  } else {
    slot.runs.push_back(run);
  }
  InstallStrip strip;
  strip.source = slot.used;
  strip.rows = rows;
  strip.columns = static_cast<uint32_t>(matrix.cols);
  strip.dtype = static_cast<uint32_t>(matrix.dtype);
  strip.is_b = is_b ? 1 : 0;
  strip.first_tile = is_b ? shape.b_tile + tile : shape.a_tile + tile * shape.in_tiles();
  strip.tile_stride = is_b ? shape.rank_tiles() : 1;
  slot.strips.push_back(strip);
  slot.used += bytes;
}

void AdapterInstaller::Flush(const DeviceAdapter* adapter) {
  Slot& slot = slots_[current_];
  if (slot.strips.empty()) return;
  const size_t strip_bytes = slot.strips.size() * sizeof(InstallStrip);
  std::memcpy(slot.host, slot.strips.data(), strip_bytes);
  LS_CUDA(cudaMemcpyAsync(slot.device, slot.host, strip_bytes, cudaMemcpyHostToDevice, copies_));
  for (const Run& run : slot.runs) {
    LS_CUDA(cudaMemcpyAsync(slot.device + kDataOffset + run.to, run.from, run.bytes,
                            cudaMemcpyHostToDevice, copies_));
  }
  LS_CUDA(cudaEventRecord(slot.copied, copies_));
  LS_CUDA(cudaStreamWaitEvent(stream_, slot.copied, 0));
  InstallTiles(stream_, reinterpret_cast<const InstallStrip*>(slot.device),
               static_cast<uint32_t>(slot.strips.size()),
               reinterpret_cast<const uint8_t*>(slot.device + kDataOffset), adapter);
  LS_CUDA(cudaEventRecord(slot.done, stream_));
  slot.strips.clear();
  slot.runs.clear();
  slot.used = 0;
  current_ = 1 - current_;
}

}  // namespace loraserve
