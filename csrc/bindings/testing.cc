// _testing: C++ parts that have no product binding, for the Python tests. Never shipped.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "memory/page_arena.h"

namespace py = pybind11;
using namespace loraserve;

namespace {

void ThrowIfError(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::kResourceExhausted) {
    PyErr_SetString(PyExc_MemoryError, status.message().c_str());
    throw py::error_already_set();
  }
  throw std::invalid_argument(status.message());
}

template <class T>
T Unwrap(Result<T> result) {
  ThrowIfError(result.status());
  return std::move(result.value());
}

}  // namespace

PYBIND11_MODULE(_testing, m) {
  py::enum_<PageUse>(m, "PageUse")
      .value("FREE", PageUse::kFree)
      .value("KV", PageUse::kKv)
      .value("ADAPTER", PageUse::kAdapter);
  py::class_<PageArena>(m, "PageArena")
      .def(py::init([](uint64_t page_bytes, uint32_t num_pages) {
             return Unwrap(PageArena::Create(page_bytes, num_pages));
           }),
           py::arg("page_bytes"), py::arg("num_pages"))
      .def("allocate", [](PageArena& arena, uint32_t count,
                          PageUse use) { return Unwrap(arena.Allocate(count, use)); })
      .def("free", [](PageArena& arena,
                      const std::vector<PageId>& pages) { ThrowIfError(arena.Free(pages)); })
      .def("count", &PageArena::count)
      .def("offset", &PageArena::offset)
      .def_property_readonly("num_pages", &PageArena::num_pages);
}
