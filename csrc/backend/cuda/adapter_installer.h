// From packed adapters in host memory to tiles in pages.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <vector>

#include "backend/adapter_source.h"
#include "backend/backend.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/host_registry.h"
#include "backend/cuda/lora_kernels.h"

namespace loraserve {

class CudaAdapter final : public InstalledAdapter {
 public:
  ~CudaAdapter() override;
  uint64_t weight_bytes() const override { return weight_bytes_; }

  const DeviceAdapter* device() const { return device_; }
  uint32_t num_layers() const { return num_layers_; }
  // The largest of each module over the layers.
  std::span<const DeviceModule, kCudaLinearModules> largest() const { return largest_; }

 private:
  friend class AdapterInstaller;
  uint64_t weight_bytes_ = 0;
  uint32_t num_layers_ = 0;
  std::array<DeviceModule, kCudaLinearModules> largest_;
  const DeviceAdapter* device_ = nullptr;
  void* block_ = nullptr;
  uint64_t block_bytes_ = 0;
  std::shared_ptr<BlockCache> cache_;
};

// Tiles that an adapter fills.
uint64_t AdapterTiles(const AdapterSource& source);

// Writes adapters on streams of its own, for one thread at a time; outlives what it starts.
//
// Packed bytes in registered host memory are copied from where they are; others go through
// page-locked memory here. One stream copies to the device, another runs the kernel that lays them
// out in pages, so that the next part is on its way meanwhile. Neither is the steps': only the
// kernel waits for the step before it, and the host only where both slots are under way.
class AdapterInstaller {
 public:
  // `page_bytes`: a power of two, at least a tile. `registry` outlives the installer.
  AdapterInstaller(uint8_t* arena, uint64_t page_bytes, HostRegistry* registry);
  ~AdapterInstaller();
  AdapterInstaller(const AdapterInstaller&) = delete;
  AdapterInstaller& operator=(const AdapterInstaller&) = delete;

  // As Backend::StartInstall. What is written comes after `steps`: a step that is still under way
  // may read what the pages held before.
  Result<std::unique_ptr<AdapterInstall>> Start(const AdapterSource& source,
                                                std::span<const PageId> pages, cudaEvent_t steps);

 private:
  class Install;
  // Contiguous on both sides.
  struct Run {
    const std::byte* from;
    uint64_t to;  // of the slot's data
    uint64_t bytes;
  };
  // Two slots take turns: one is filled while the other is on its way.
  struct Slot {
    std::byte* host = nullptr;
    std::byte* device = nullptr;
    cudaEvent_t copied = nullptr;
    cudaEvent_t done = nullptr;
    std::vector<InstallStrip> strips;
    std::vector<Run> runs;
    uint64_t used = 0;
  };
  Status WriteDescriptor(std::span<const DeviceModule> modules, std::span<const PageId> pages,
                         CudaAdapter& adapter);
  // Rank tile `tile` of A or B.
  void AddStrip(const HostMatrix& matrix, bool is_b, const DeviceModule& shape, uint32_t tile,
                const DeviceAdapter* adapter);
  void Flush(const DeviceAdapter* adapter);

  uint8_t* arena_;
  uint64_t page_bytes_;
  HostRegistry* registry_;
  cudaStream_t copies_ = nullptr;  // what it does, a kernel on stream_ waits for
  cudaStream_t stream_ = nullptr;
  std::array<Slot, 2> slots_;
  size_t current_ = 0;
  StagedTable descriptor_;
  std::shared_ptr<BlockCache> cache_ = std::make_shared<BlockCache>();
};

}  // namespace loraserve
