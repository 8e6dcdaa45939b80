// Where this process runs, as far as reading another process's memory goes.
#pragma once

#include <string>

namespace loraserve {

// "boot_id:pid_namespace:uid". Two processes may read each other's memory (cma) only where these
// are equal: the same running kernel, pids that mean the same, the same user.
std::string HostIdentity();

}  // namespace loraserve
