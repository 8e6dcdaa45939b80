// The work list of the CUDA LoRA kernels as plain tuples.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "backend/cuda/work_list.h"
#include "bindings/testing.h"

namespace py = pybind11;

namespace loraserve {
namespace {

// Row begin, row count, and for each module its largest (rank, in, out).
using SegmentTuple = std::tuple<int32_t, int32_t, std::vector<std::tuple<int, int, int>>>;

// In the order of tickets: (group, is expand, entry, row begin, row count, module, then of a shrink
// unit the split, its ranks' and inputs' [begin, end), of an expand unit 0, 0, 0 and its outputs').
using UnitTuple =
    std::tuple<int, bool, uint32_t, int32_t, int32_t, uint32_t, std::array<uint32_t, 5>>;

std::tuple<std::vector<UnitTuple>, std::vector<std::tuple<uint64_t, uint64_t>>, uint64_t> PlanUnits(
    const std::vector<SegmentTuple>& segments) {
  std::vector<std::array<DeviceModule, kCudaLinearModules>> largest;
  largest.reserve(segments.size());
  std::vector<LoraPlanSegment> rows;
  for (const auto& [begin, count, modules] : segments) {
    auto& own = largest.emplace_back();
    for (size_t m = 0; m < kCudaLinearModules; ++m) {
      const auto& [rank, in, out] = modules.at(m);
      own[m].rank = static_cast<uint32_t>(rank);
      own[m].in_features = static_cast<uint32_t>(in);
      own[m].out_features = static_cast<uint32_t>(out);
    }
    rows.push_back({.row_begin = begin, .row_count = count, .adapter = nullptr, .largest = own});
  }
  LoraPlan plan;
  PlanLora(rows, plan);
  // As the device does it.
  std::vector<LoraUnit> units(plan.num_units, {UINT32_MAX, UINT32_MAX});
  std::vector<std::tuple<uint64_t, uint64_t>> h;
  for (uint32_t e = 0; e < plan.entries.size(); ++e) {
    const LoraEntry& entry = plan.entries[e];
    for (uint32_t i = 0; i < entry.shrink_units; ++i) units.at(entry.first_shrink + i) = {e, i};
    for (uint32_t i = 0; i < entry.expand_units; ++i) units.at(entry.first_expand + i) = {e, i};
    const uint64_t at = uint64_t{entry.h_offset} * 16;
    h.emplace_back(at, at + uint64_t{entry.splits} * static_cast<uint32_t>(entry.row_count) *
                                entry.rank_stride);
  }
  std::vector<UnitTuple> out;
  for (int group = 0; group < kNumLoraGroups; ++group) {
    const LoraGroupRange& range = plan.groups[static_cast<size_t>(group)];
    for (uint32_t i = 0; i < range.shrink_units + range.expand_units; ++i) {
      const LoraUnit unit = units.at(range.first_unit + i);
      const LoraEntry& entry = plan.entries.at(unit.entry);
      const bool expand = i >= range.shrink_units;
      std::array<uint32_t, 5> span{};
      if (expand) {
        const ExpandPart part = ExpandPartOf(entry, unit.part);
        span = {0, 0, 0, part.tile_begin * kTileColumns, part.tile_end * kTileColumns};
      } else {
        const ShrinkPart part = ShrinkPartOf(entry, unit.part);
        span = {part.split, part.rank_begin, part.rank_begin + kShrinkRanks,
                part.tile_begin * kTileColumns, part.tile_end * kTileColumns};
      }
      out.emplace_back(group, expand, unit.entry, entry.row_begin, entry.row_count, entry.module,
                       span);
    }
  }
  return {out, h, plan.h_floats};
}

}  // namespace

void BindWorkList(py::module_& m) {
  m.def("plan_lora_units", &PlanUnits, py::arg("segments"));
  m.def("a_tile_index", &ATileIndex);
  m.def("b_tile_index", &BTileIndex);
}

}  // namespace loraserve
