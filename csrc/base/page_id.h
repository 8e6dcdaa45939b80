// The number of a page of the arena.
#pragma once

#include <cstdint>

namespace loraserve {

using PageId = uint32_t;

}  // namespace loraserve
