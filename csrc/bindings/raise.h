// From a Status to a Python exception: StatusError(code, message), the code being a gRPC name.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "base/status.h"

namespace loraserve {

struct StatusException {
  Status status;
};

inline const char* CodeName(StatusCode code) {
  switch (code) {
    case StatusCode::kOk:
      return "OK";
    case StatusCode::kCancelled:
      return "CANCELLED";
    case StatusCode::kInvalidArgument:
      return "INVALID_ARGUMENT";
    case StatusCode::kDeadlineExceeded:
      return "DEADLINE_EXCEEDED";
    case StatusCode::kNotFound:
      return "NOT_FOUND";
    case StatusCode::kAlreadyExists:
      return "ALREADY_EXISTS";
    case StatusCode::kFailedPrecondition:
      return "FAILED_PRECONDITION";
    case StatusCode::kResourceExhausted:
      return "RESOURCE_EXHAUSTED";
    case StatusCode::kUnavailable:
      return "UNAVAILABLE";
  }
  return "INTERNAL";
}

inline void RaiseIfError(const Status& status) {
  if (!status.ok()) throw StatusException{status};
}

template <class T>
T Unwrap(Result<T> result) {
  RaiseIfError(result.status());
  return std::move(result.value());
}

// Adds StatusError to the module and teaches pybind11 to raise it.
inline void RegisterStatusError(pybind11::module_& m) {
  static PyObject* type = nullptr;
  const std::string name = m.attr("__name__").cast<std::string>() + ".StatusError";
  type = PyErr_NewException(name.c_str(), PyExc_Exception, nullptr);
  m.attr("StatusError") = pybind11::reinterpret_borrow<pybind11::object>(type);
  pybind11::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const StatusException& e) {
      const pybind11::tuple args =
          pybind11::make_tuple(CodeName(e.status.code()), e.status.message());
      PyErr_SetObject(type, args.ptr());
    }
  });
}

}  // namespace loraserve
