#include "cuda/tile_plan.cuh"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <memory>

#include "cuda/tile_matmul.cuh"

namespace fastinfer {

constexpr std::array<const char*, 4> kTileKinds{"w4a16", "w8a16", "w8a8", "linear"};

static int tile_kind(const char* op, const std::string& name) {
  const auto found = std::find(kTileKinds.begin(), kTileKinds.end(), name);
  FASTINFER_CHECK(op, found != kTileKinds.end(), "kind must be w4a16, w8a16, w8a8 or linear, got '", name, "'");
  return static_cast<int>(found - kTileKinds.begin());
}
static bool has_wgmma(int kind) { return kind != static_cast<int>(TileKind::kLinear); }

static TilePlan checked_plan(const char* op, int kind, int64_t kernel, int64_t ranks, int64_t shape) {
  const TileKernel last = has_wgmma(kind) ? TileKernel::kWgmma : TileKernel::kDecode;
  FASTINFER_CHECK(op, kernel >= 0 && kernel <= static_cast<int>(last), kTileKinds[kind], " has no kernel ", kernel);
  const TilePlan plan{static_cast<TileKernel>(kernel), static_cast<int>(ranks), static_cast<int>(shape)};
  if (plan.kernel == TileKernel::kAuto) return {};
  const bool decode = plan.kernel == TileKernel::kDecode;
  const int64_t shapes = decode ? kDecodeShapes.size() : kWgmmaShapes.size();
  const int most = decode ? kDecodeMaxRanks : kWgmmaMaxRanks;
  FASTINFER_CHECK(op, shape >= 0 && shape < shapes, "kernel ", kernel, " has ", shapes, " shapes, got ", shape);
  FASTINFER_CHECK(op, ranks >= 1 && ranks <= most, "kernel ", kernel, " takes 1 to ", most, " ranks, got ", ranks);
  return plan;
}

// ---- the table ----------------------------------------------------------------------------------------------------------
// Looked up at every launch, so readers take no lock. A table never changes; a new one takes its place, and the old one is
// not freed, since a reader may still be in it: tables are small, and set a few times in a process.

using PlanKey = std::array<int64_t, 7>;  // capability, multiprocessors, kind, group, N, K, largest M
using PlanTable = std::map<PlanKey, TilePlan>;
static std::atomic<const PlanTable*> table{nullptr};
static thread_local std::array<TilePlan, kTileKinds.size()> forced;  // by kind

TilePlan find_tile_plan(TileKind kind, int group, int m, int n, int k, const DeviceLimits& device) {
  if (forced[static_cast<int>(kind)].forced) return forced[static_cast<int>(kind)];
  const PlanTable* plans = table.load(std::memory_order_acquire);
  if (plans == nullptr) return {};
  const PlanKey key{device.capability, device.multiprocessors, static_cast<int>(kind), group, n, k, m};
  const auto found = plans->lower_bound(key);  // the same weight's smallest bound that is not below m, if it has one
  if (found == plans->end() || !std::equal(key.begin(), key.end() - 1, found->first.begin())) return {};
  return found->second;
}

// Replaces the plans of a device and kind by `rows`, one after another: group, N, K, largest M, kernel, ranks, shape.
void set_tile_plans(int64_t capability, int64_t multiprocessors, std::string kind, std::vector<int64_t> rows) {
  constexpr const char* op = "set_tile_plans";
  constexpr int kColumns = 7;
  FASTINFER_CHECK(op, rows.size() % kColumns == 0, "rows must be ", kColumns, " numbers each, got ", rows.size());
  const PlanKey begin{capability, multiprocessors, tile_kind(op, kind)};
  const PlanKey end{capability, multiprocessors, begin[2] + 1};
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const PlanTable* now = table.load(std::memory_order_relaxed);
  auto next = now == nullptr ? std::make_unique<PlanTable>() : std::make_unique<PlanTable>(*now);
  next->erase(next->lower_bound(begin), next->lower_bound(end));
  for (const int64_t* row = rows.data(); row != rows.data() + rows.size(); row += kColumns) {
    PlanKey key = begin;
    std::copy(row, row + 4, key.begin() + 3);
    (*next)[key] = checked_plan(op, static_cast<int>(begin[2]), row[4], row[5], row[6]);
  }
  table.store(next.release(), std::memory_order_release);
}

// What this thread's tile matmuls of a kind run, whatever the table says; kernel 0 ends it. Returns what was forced before.
std::tuple<int64_t, int64_t, int64_t> force_tile_plan(std::string kind, int64_t kernel, int64_t ranks, int64_t shape) {
  constexpr const char* op = "force_tile_plan";
  const int index = tile_kind(op, kind);
  const TilePlan before = forced[index];
  forced[index] = checked_plan(op, index, kernel, ranks, shape);
  forced[index].forced = kernel != 0;
  return {static_cast<int64_t>(before.kernel), before.ranks, before.shape};
}

// What a plan of this kind may be, one line a kernel from number 1 on: name, most ranks, and the names of its shapes in the
// order of their numbers. Files hold names, so that they keep their meaning when a list changes.
std::string tile_plan_candidates(std::string kind) {
  const int index = tile_kind("tile_plan_candidates", kind);
  std::string out = text("decode ", kDecodeMaxRanks);
  for (const DecodeShape& s : kDecodeShapes) {
    out += text(" ", 16 * s.tiles, "x", s.depth, "-", s.warps, "x", s.resident, "-", s.k_warps);
  }
  if (!has_wgmma(index)) return out;
  out += text("\nwgmma ", kWgmmaMaxRanks);
  for (const WgmmaShape& s : kWgmmaShapes) {
    out += text(" ", s.tokens, "x", 64 * s.consumers);
    if (s.members > 1) out += text("x", s.members);
    if (s.resident > 1) out += text("-", s.resident);
  }
  return out;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CompositeExplicitAutograd, m) {
  m.impl("set_tile_plans", TORCH_BOX(&fastinfer::set_tile_plans));
  m.impl("force_tile_plan", TORCH_BOX(&fastinfer::force_tile_plan));
  m.impl("tile_plan_candidates", TORCH_BOX(&fastinfer::tile_plan_candidates));
}
