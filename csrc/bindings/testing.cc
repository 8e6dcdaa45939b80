// _testing: C++ parts that have no product binding, for the Python tests. Never shipped.
#include "bindings/testing.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backend/cpu/kernels.h"
#include "base/dtype.h"
#include "base/philox.h"
#include "bindings/raise.h"
#include "kv/prefix_cache.h"
#include "memory/page_arena.h"

namespace py = pybind11;
using namespace loraserve;

PYBIND11_MODULE(_testing, m) {
  RegisterStatusError(m);
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
                      const std::vector<PageId>& pages) { RaiseIfError(arena.Free(pages)); })
      .def("count", &PageArena::count)
      .def("offset", &PageArena::offset)
      .def_property_readonly("num_pages", &PageArena::num_pages);
  py::class_<BlockPool>(m, "BlockPool")
      .def(py::init<PageArena*, uint32_t>(), py::keep_alive<1, 2>())
      .def("allocate", &BlockPool::Allocate)
      .def("free", &BlockPool::Free);
  py::class_<EvictionOrder>(m, "EvictionOrder")
      .def(py::init<>())
      .def(
          "key_of",
          [](const EvictionOrder& order, double cost, uint32_t uses, uint64_t now) {
            const EvictionKey key = order.KeyOf(cost, uses, now);
            return std::pair(key.worth, key.last_use);
          },
          py::arg("cost"), py::arg("uses"), py::arg("now"))
      .def(
          "evicted",
          [](EvictionOrder& order, double worth, uint64_t last_use) {
            order.Evicted({worth, last_use});
          },
          py::arg("worth"), py::arg("last_use"));
  py::class_<PrefixCache>(m, "PrefixCache")
      .def(py::init<BlockPool*, EvictionOrder*, int>(), py::keep_alive<1, 2>(),
           py::keep_alive<1, 3>())
      .def("set_cost", &PrefixCache::SetCost)
      .def_readonly_static("NONE", &PrefixCache::kNone)
      .def("root", &PrefixCache::Root)
      .def("find", [](const PrefixCache& cache, PrefixCache::NodeId parent,
                      const std::vector<int32_t>& tokens) { return cache.Find(parent, tokens); })
      .def("insert",
           [](PrefixCache& cache, PrefixCache::NodeId parent, const std::vector<int32_t>& tokens,
              BlockId block) { return cache.Insert(parent, tokens, block); })
      .def("block", &PrefixCache::block)
      .def("use", &PrefixCache::Use)
      .def("release", &PrefixCache::Release)
      .def("may_evict", [](const PrefixCache& cache) { return cache.NextKey().has_value(); })
      .def("evict", &PrefixCache::Evict)
      .def("evictable", &PrefixCache::evictable);
  BindScheduler(m);
  BindBackendOps(m);
  BindSpeed(m);
  BindLoraSpeed(m);
  BindPacedEngine(m);
  BindWorkList(m);
  BindTransfer(m);
  m.def("kernel_names", [] {
    std::vector<std::string> names;
    for (const char* limit : {"generic", "x86-64-v2", "x86-64-v3", "x86-64-v4"}) {
      const std::string name = SelectKernels(limit).name;
      if (names.empty() || names.back() != name) names.push_back(name);
    }
    return names;
  });
  m.def("philox", &Philox);
  m.def("f16_to_f32", &F16ToF32);
  m.def("f32_to_bf16", &F32ToBF16);
}
