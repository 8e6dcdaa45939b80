// The parts of _testing, one source file each.
#pragma once

#include <pybind11/pybind11.h>

namespace loraserve {

void BindScheduler(pybind11::module_& m);
void BindBackendOps(pybind11::module_& m);
void BindSpeed(pybind11::module_& m);
void BindLoraSpeed(pybind11::module_& m);
void BindPacedEngine(pybind11::module_& m);
void BindWorkList(pybind11::module_& m);
void BindTransfer(pybind11::module_& m);

}  // namespace loraserve
