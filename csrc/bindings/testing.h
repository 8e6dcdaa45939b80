// The parts of _testing, one source file each.
#pragma once

#include <pybind11/pybind11.h>

namespace loraserve {

void BindScheduler(pybind11::module_& m);
void BindBackendOps(pybind11::module_& m);

}  // namespace loraserve
