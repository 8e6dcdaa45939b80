// _transfer_reader: one-sided reads inside the node. Imported by loraserve/node/transfer/in_node.py
// alone, and only where GPUDirect is switched on: it brings UCX into the process.
#include <pybind11/pybind11.h>
#include <ucp/api/ucp.h>

#include <memory>
#include <string>
#include <utility>

#include "bindings/raise.h"
#include "transfer/slot_reader.h"

namespace py = pybind11;

namespace loraserve {
namespace {

UcxSettings Settings(bool device) {
  if (device) return DeviceSettings();
  unsigned major = 0;
  unsigned minor = 0;
  unsigned patch = 0;
  ucp_get_version(&major, &minor, &patch);
  return SettingsFor(major, minor);
}

std::string Read(SlotReader& reader, uint64_t address, uint64_t generation, uint64_t size_bytes,
                 uint64_t skip_bytes, uint64_t local_offset, uint64_t timeout_us,
                 uint32_t header_bytes, const py::bytes& worker_address, const py::bytes& rkey) {
  ReadRequest request{.address = address,
                      .generation = generation,
                      .size_bytes = size_bytes,
                      .skip_bytes = skip_bytes,
                      .local_offset = local_offset,
                      .timeout_us = timeout_us,
                      .header_bytes = header_bytes,
                      .worker_address = worker_address,
                      .rkey = rkey};
  const py::gil_scoped_release release;
  return Unwrap(reader.Read(std::move(request)));
}

}  // namespace
}  // namespace loraserve

PYBIND11_MODULE(_transfer_reader, m) {
  using namespace loraserve;
  m.doc() = "The sidecar's reader, for memory of this process.";
  RegisterStatusError(m);
  py::class_<SlotReader>(m, "SlotReader")
      .def(py::init([](bool device) {
             const py::gil_scoped_release release;
             return Unwrap(SlotReader::Create(Settings(device)));
           }),
           py::arg("device"))
      .def(
          "register",
          [](SlotReader& reader, uint64_t address, uint64_t bytes, bool device) {
            const py::gil_scoped_release release;
            RaiseIfError(reader.Register(reinterpret_cast<void*>(address), bytes,
                                         device ? MemoryKind::kCuda : MemoryKind::kHost));
          },
          py::arg("address"), py::arg("bytes"), py::arg("device"))
      .def("read", &Read, py::kw_only(), py::arg("address"), py::arg("generation"),
           py::arg("size_bytes"), py::arg("skip_bytes"), py::arg("local_offset"),
           py::arg("timeout_us"), py::arg("header_bytes"), py::arg("worker_address"),
           py::arg("rkey"))
      .def_property_readonly("stuck", &SlotReader::stuck)
      .def_property_readonly("ucx_version", &SlotReader::ucx_version)
      .def_property_readonly("transports", &SlotReader::transports);
}
