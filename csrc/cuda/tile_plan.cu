#include "cuda/tile_plan.cuh"

#include <torch/csrc/stable/library.h>

namespace fastinfer {

static thread_local TilePlan forced;

const TilePlan& forced_tile_plan() { return forced; }

// Returns whether a plan was forced before.
bool force_tile_plan(int64_t kernel, int64_t ranks, int64_t resident, int64_t shape) {
  const bool before = forced.kernel != TileKernel::kAuto;
  forced = {static_cast<TileKernel>(kernel), static_cast<int>(ranks), static_cast<int>(resident), static_cast<int>(shape)};
  return before;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CompositeExplicitAutograd, m) {
  m.impl("force_tile_plan", TORCH_BOX(&fastinfer::force_tile_plan));
}
