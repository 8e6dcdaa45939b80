// The sidecar's parts that know no UCX: messages, envelopes, and one read over a transport whose
// every step the test decides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/raise.h"
#include "bindings/testing.h"
#include "transfer/envelope.h"
#include "transfer/messages.h"
#include "transfer/remote_read.h"
#include "transfer/transport.h"

namespace py = pybind11;

namespace loraserve {
namespace {

py::tuple Fields(const Request& request) {
  return std::visit(
      [](const auto& message) -> py::tuple {
        using T = std::decay_t<decltype(message)>;
        if constexpr (std::is_same_v<T, Hello>) {
          return py::make_tuple("hello", message.capacity_bytes);
        } else if constexpr (std::is_same_v<T, ExportRequest>) {
          return py::make_tuple("export", message.offset, message.length);
        } else if constexpr (std::is_same_v<T, WithdrawRequest>) {
          return py::make_tuple("withdraw", message.offset);
        } else if constexpr (std::is_same_v<T, ReadRequest>) {
          return py::make_tuple("read", message.address, message.generation, message.size_bytes,
                                message.skip_bytes, message.local_offset, message.timeout_us,
                                message.header_bytes, py::bytes(message.worker_address),
                                py::bytes(message.rkey));
        } else if constexpr (std::is_same_v<T, CancelRequest>) {
          return py::make_tuple("cancel");
        } else {
          return py::make_tuple("ping");
        }
      },
      request);
}

// A transport that does nothing by itself: the test ends its gets, in any order.
class ScriptedTransport : public Transport {
 public:
  struct Outstanding {
    uint64_t address;
    void* into;
    size_t bytes;
    GetDone done;
  };

  Result<std::shared_ptr<RemoteMemory>> Open(std::string_view, std::string_view) override {
    ++opens;
    if (!refusal.ok()) {
      return refusal;
    }
    return std::shared_ptr<RemoteMemory>(std::make_shared<Memory>(this));
  }
  Result<ExportedMemory> Export(void*, size_t) override {
    return Status(StatusCode::kFailedPrecondition, "scripted");
  }
  void Withdraw(void*) override {}
  bool Progress() override { return false; }
  int SleepMs() override { return -1; }
  int event_fd() const override { return -1; }

  std::map<int, Outstanding> gets;
  int number = 0;
  int opens = 0;
  int breaks = 0;
  int memories = 0;
  Status refusal;

 private:
  class Memory : public RemoteMemory {
   public:
    explicit Memory(ScriptedTransport* transport) : transport_(transport) {
      ++transport_->memories;
    }
    ~Memory() override { --transport_->memories; }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    void Get(uint64_t address, void* into, size_t bytes, GetDone done) override {
      transport_->gets[transport_->number++] = {address, into, bytes, std::move(done)};
    }
    std::string transports() const override { return "scripted"; }
    void Break() override { ++transport_->breaks; }

   private:
    ScriptedTransport* const transport_;
  };
};

// The product's are 16 MiB.
constexpr uint64_t kScriptedPieceBytes = 1000;

// One RemoteRead with its own memory.
class ScriptedRead {
 public:
  ScriptedRead(uint64_t address, uint64_t generation, uint64_t size_bytes, uint64_t skip_bytes,
               double timeout_s, double now_s)
      : memory_(size_bytes - skip_bytes), scratch_(2 * kSlotHeaderBytes) {
    ReadRequest request{};
    request.address = address;
    request.generation = generation;
    request.size_bytes = size_bytes;
    request.skip_bytes = skip_bytes;
    request.timeout_us = static_cast<uint64_t>(timeout_s * 1e6);
    request.header_bytes = kSlotHeaderBytes;
    RaiseIfError(CheckReadRequest(request, memory_.size()));
    read_ = std::make_unique<RemoteRead>(std::move(request), memory_.data(), scratch_.data(),
                                         &transport_, now_s, kScriptedPieceBytes);
  }

  // (number, address, bytes) of every get that has not ended.
  std::vector<std::tuple<int, uint64_t, size_t>> Gets() const {
    std::vector<std::tuple<int, uint64_t, size_t>> gets;
    for (const auto& [number, get] : transport_.gets) {
      gets.emplace_back(number, get.address, get.bytes);
    }
    return gets;
  }
  void Finish(int number, const std::string& outcome, std::string_view data) {
    ScriptedTransport::Outstanding get = std::move(transport_.gets.at(number));
    transport_.gets.erase(number);
    if (outcome == "done") {
      if (data.size() != get.bytes) {
        throw py::value_error("another number of bytes");
      }
      std::memcpy(get.into, data.data(), data.size());
    }
    get.done(outcome == "done"     ? GetOutcome::kDone
             : outcome == "broken" ? GetOutcome::kBroken
                                   : GetOutcome::kFailed,
             "scripted");
  }

  std::vector<uint8_t> memory_;
  std::vector<uint8_t> scratch_;
  ScriptedTransport transport_;
  std::unique_ptr<RemoteRead> read_;
};

}  // namespace

void BindTransfer(py::module_& m) {
  m.attr("TRANSFER_PIECE_BYTES") = kScriptedPieceBytes;
  m.attr("TRANSFER_PIECES_AHEAD") = kPiecesAhead;
  // (what is left, (id, fields) or None)
  m.def("transfer_take_request", [](const std::string& bytes) {
    std::string buffer = bytes;
    const std::optional<RequestFrame> frame = Unwrap(TakeRequest(&buffer));
    return py::make_tuple(
        py::bytes(buffer),
        frame ? py::object(py::make_tuple(frame->id, Fields(frame->request))) : py::none());
  });
  m.def("transfer_ready", [](uint64_t id, std::string version, std::string host,
                             std::string transports, std::string address) {
    return py::bytes(EncodeAnswer(
        id, Ready{std::move(version), std::move(host), std::move(transports), std::move(address)}));
  });
  m.def("transfer_exported", [](uint64_t id, uint64_t address, std::string rkey) {
    return py::bytes(EncodeAnswer(id, Exported{address, std::move(rkey)}));
  });
  m.def("transfer_progress",
        [](uint64_t id, uint64_t bytes) { return py::bytes(EncodeAnswer(id, Progress{bytes})); });
  m.def("transfer_ended", [](uint64_t id, std::string transports) {
    return py::bytes(EncodeAnswer(id, Ended{std::move(transports)}));
  });
  m.def("transfer_failed", [](uint64_t id, int code, std::string message) {
    return py::bytes(EncodeAnswer(id, Failed{static_cast<StatusCode>(code), std::move(message)}));
  });
  m.def("transfer_wrap", [](int kind, const std::string& blob) {
    return py::bytes(WrapBlob(static_cast<BlobKind>(kind), blob));
  });
  m.def("transfer_unwrap", [](int kind, const std::string& blob) {
    return py::bytes(Unwrap(UnwrapBlob(static_cast<BlobKind>(kind), blob)));
  });
  py::class_<ScriptedRead>(m, "ScriptedRead")
      .def(py::init<uint64_t, uint64_t, uint64_t, uint64_t, double, double>(), py::arg("address"),
           py::arg("generation"), py::arg("size_bytes"), py::arg("skip_bytes"),
           py::arg("timeout_s"), py::arg("now_s"))
      .def("advance", [](ScriptedRead& read, double now_s) { read.read_->Advance(now_s); })
      .def("cancel", [](ScriptedRead& read, double now_s) { read.read_->Cancel(now_s); })
      .def("gets", &ScriptedRead::Gets)
      .def("finish",
           [](ScriptedRead& read, int number, const std::string& outcome, const py::bytes& data) {
             read.Finish(number, outcome, std::string_view(data));
           })
      .def("refuse_opening",
           [](ScriptedRead& read) {
             read.transport_.refusal = {StatusCode::kFailedPrecondition, "scripted: no way"};
           })
      .def("stuck", [](const ScriptedRead& read, double now_s) { return read.read_->Stuck(now_s); })
      .def_property_readonly("next_s",
                             [](const ScriptedRead& read) { return read.read_->next_s(); })
      .def_property_readonly("arrived",
                             [](const ScriptedRead& read) { return read.read_->arrived(); })
      .def_property_readonly("ended",
                             [](const ScriptedRead& read) -> py::object {
                               if (!read.read_->ended()) {
                                 return py::none();
                               }
                               return py::make_tuple(CodeName(read.read_->ended()->code()),
                                                     read.read_->ended()->message());
                             })
      .def_property_readonly("memory",
                             [](const ScriptedRead& read) {
                               return py::bytes(reinterpret_cast<const char*>(read.memory_.data()),
                                                read.memory_.size());
                             })
      .def_property_readonly("opens",
                             [](const ScriptedRead& read) { return read.transport_.opens; })
      .def_property_readonly("breaks",
                             [](const ScriptedRead& read) { return read.transport_.breaks; })
      .def_property_readonly("memories",
                             [](const ScriptedRead& read) { return read.transport_.memories; });
}

}  // namespace loraserve
