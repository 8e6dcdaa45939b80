#include "backend/cpu/host_memory.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>

namespace loraserve {

namespace {

// A file that holds one number; UINT64_MAX where there is none ("max" among the reasons).
uint64_t ReadNumber(const char* path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "re"), &std::fclose);
  unsigned long long value = 0;
  if (file == nullptr || std::fscanf(file.get(), "%llu", &value) != 1) return UINT64_MAX;
  return value;
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
