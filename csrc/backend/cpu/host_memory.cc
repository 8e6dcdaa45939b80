#include "backend/cpu/host_memory.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

namespace loraserve {

namespace {

// A file that holds one number; UINT64_MAX where there is none ("max" among the reasons).
uint64_t ReadNumber(const char* path) {
  std::ifstream file(path);
  uint64_t value = 0;
  return file >> value ? value : UINT64_MAX;
}

}  // namespace

uint64_t HostMemoryBytes() {
  uint64_t bytes = UINT64_MAX;
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page_bytes = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page_bytes > 0) {
    bytes = static_cast<uint64_t>(pages) * static_cast<uint64_t>(page_bytes);
  }
  for (const char* limit : {"/sys/fs/cgroup/memory.max",                       // version 2
                            "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {  // version 1
    bytes = std::min(bytes, ReadNumber(limit));
  }
  return bytes;
}

}  // namespace loraserve
