// How a tile matmul is run: by which kernel, in what shape. Forced for a thread and kind (the tuner does that), or found in a
// table of measured plans, or left to the heuristics of tile_matmul.cuh.
#pragma once

#include "common/cuda.cuh"

namespace fastinfer {

enum class TileKind : int { kW4A16, kW8A16, kW8A8, kLinear };
enum class TileKernel : int { kAuto, kDecode, kWgmma };  // kAuto: the heuristics decide

struct TilePlan {
  TileKernel kernel = TileKernel::kAuto;
  int ranks = 1;        // CTAs of a cluster that split K
  int shape = 0;        // of the kernel's list in tile_matmul.cuh
  bool forced = false;  // where it cannot run the op fails, rather than run another
};

// The plan for x [m, k] and a weight [n, k] in groups of `group` (0: none) on such a device.
TilePlan find_tile_plan(TileKind kind, int group, int m, int n, int k, const DeviceLimits& device);

}  // namespace fastinfer
