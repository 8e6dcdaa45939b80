#include "transfer/host_identity.h"

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>

namespace loraserve {

std::string HostIdentity() {
  std::string boot_id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot_id;
  struct stat pid_namespace{};
  if (boot_id.empty() || stat("/proc/self/ns/pid", &pid_namespace) != 0) {
    // Equal to nobody's.
    return "unknown:" + std::to_string(getpid()) + ":" + std::to_string(geteuid());
  }
  return boot_id + ":" + std::to_string(pid_namespace.st_ino) + ":" + std::to_string(geteuid());
}

}  // namespace loraserve
