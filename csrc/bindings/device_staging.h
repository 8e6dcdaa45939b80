// Memory of a device that something else than the engine writes to, and its way to the host.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "backend/registry.h"
#include "bindings/raise.h"

namespace loraserve {

// On a device without memory of its own ("cpu", "cuda-emulated") host memory stands in. One thread
// at a time.
class DeviceStaging {
 public:
  DeviceStaging(const std::string& device, uint64_t bytes)
      : backend_(Unwrap(CreateBackend({.device = device, .threads = 1}))),
        buffer_(Unwrap(backend_->Allocate(bytes))),
        bytes_(bytes) {}

  uint64_t address() const { return reinterpret_cast<uint64_t>(buffer_->data()); }
  uint64_t bytes() const { return bytes_; }
  // Fills writable `into` with the bytes from `offset` on.
  void CopyToHost(uint64_t offset, const pybind11::buffer& into) {
    const pybind11::buffer_info host = into.request(/*writable=*/true);
    std::byte* const device = At(offset, host);
    const pybind11::gil_scoped_release release;
    backend_->CopyToHost(nullptr, device, host.ptr, BytesOf(host));
    backend_->Synchronize(nullptr);
  }
  void CopyFromHost(uint64_t offset, const pybind11::buffer& from) {
    const pybind11::buffer_info host = from.request();
    std::byte* const device = At(offset, host);
    const pybind11::gil_scoped_release release;
    backend_->CopyToDevice(nullptr, host.ptr, device, BytesOf(host));
    backend_->Synchronize(nullptr);
  }

 private:
  static uint64_t BytesOf(const pybind11::buffer_info& host) {
    return static_cast<uint64_t>(host.size * host.itemsize);
  }
  std::byte* At(uint64_t offset, const pybind11::buffer_info& host) {
    if (offset > bytes_ || BytesOf(host) > bytes_ - offset) {
      throw pybind11::value_error("offset: past the end of the device memory");
    }
    return static_cast<std::byte*>(buffer_->data()) + offset;
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Buffer> buffer_;
  uint64_t bytes_;
};

inline void BindDeviceStaging(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<DeviceStaging>(m, "DeviceStaging")
      .def(py::init([](const std::string& device, uint64_t bytes) {
             const py::gil_scoped_release release;
             return std::make_unique<DeviceStaging>(device, bytes);
           }),
           py::arg("device"), py::arg("bytes"))
      .def_property_readonly("address", &DeviceStaging::address)
      .def_property_readonly("bytes", &DeviceStaging::bytes)
      .def("copy_from_host", &DeviceStaging::CopyFromHost, py::arg("offset"), py::arg("host"))
      .def("copy_to_host", &DeviceStaging::CopyToHost, py::arg("offset"), py::arg("into"));
}

}  // namespace loraserve
