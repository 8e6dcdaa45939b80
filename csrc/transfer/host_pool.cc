#include "transfer/host_pool.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

namespace loraserve {
namespace {

constexpr uint64_t kHugePageBytes = 2 << 20;
constexpr uint64_t kPopulateBytes = 4 << 20;
// Linux 5.14; older headers lack it, older kernels refuse it.
constexpr int kMadvPopulateWrite = 23;

}  // namespace

Result<std::unique_ptr<HostPool>> HostPool::Map(int fd, uint64_t capacity_bytes) {
  const auto wrong = [fd](const std::string& what) {
    close(fd);
    return Status(StatusCode::kInvalidArgument, "pool: " + what);
  };
  struct stat facts{};
  if (fstat(fd, &facts) != 0 || !S_ISREG(facts.st_mode)) {
    return wrong("the descriptor is no memory file");
  }
  if (capacity_bytes == 0 || static_cast<uint64_t>(facts.st_size) < capacity_bytes) {
    return wrong(std::to_string(capacity_bytes) + " bytes of a file of " +
                 std::to_string(facts.st_size));
  }
  // A page that is cut off under the mapping would end this process with SIGBUS.
  if (const int seals = fcntl(fd, F_GET_SEALS); seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return wrong("the file is not sealed against shrinking");
  }
  // On a huge page's boundary: where the file has huge pages, one entry of the page tables stands
  // for each, and reading costs what a copy does instead of 2 to 3 times as much.
  const uint64_t room = capacity_bytes + kHugePageBytes;
  void* reserved = capacity_bytes > UINT64_MAX - kHugePageBytes
                       ? MAP_FAILED
                       : mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved == MAP_FAILED) {
    return wrong(std::string("cannot be mapped: ") + std::strerror(errno));
  }
  auto* const begin = static_cast<uint8_t*>(reserved);
  uint8_t* const aligned =
      begin + (kHugePageBytes - reinterpret_cast<uintptr_t>(begin) % kHugePageBytes);
  void* data = mmap(aligned, capacity_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
  if (data == MAP_FAILED) {
    const std::string why = std::strerror(errno);
    munmap(reserved, room);
    return wrong("cannot be mapped: " + why);
  }
  // What lies behind the first hole has no memory yet: it comes when the node first uses it.
  const off_t hole = lseek(fd, 0, SEEK_HOLE);
  const uint64_t present = hole < 0 ? 0 : std::min<uint64_t>(hole, capacity_bytes);
  close(fd);
  madvise(data, capacity_bytes, MADV_HUGEPAGE);  // no harm where it is refused
  return std::unique_ptr<HostPool>(
      new HostPool(static_cast<uint8_t*>(data), capacity_bytes, present));
}

// What was reserved around it stays: address space, no memory.
HostPool::~HostPool() { munmap(data_, capacity_bytes_); }

bool HostPool::PopulateSome() {
  if (populated_ >= present_bytes_) {
    return false;
  }
  const uint64_t bytes = std::min(kPopulateBytes, present_bytes_ - populated_);
  if (madvise(data_ + populated_, bytes, kMadvPopulateWrite) != 0) {
    populated_ = present_bytes_;  // pages come with their first use then
    return false;
  }
  populated_ += bytes;
  return populated_ < present_bytes_;
}

}  // namespace loraserve
