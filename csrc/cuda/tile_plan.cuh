// How a tile matmul is run: which kernel, in what shape. Chosen by tile_matmul.cuh, or forced for a thread by the tuner.
#pragma once

namespace fastinfer {

enum class TileKernel : int { kAuto, kDecode, kWgmma };

struct TilePlan {
  TileKernel kernel = TileKernel::kAuto;
  int ranks = 0;     // CTAs of a cluster that split K
  int resident = 0;  // decode: CTAs a multiprocessor
  int shape = 0;     // decode: units a stage; wgmma: index into kWgmmaShapes
};

// What this thread is to run; kAuto unless the tuner has said otherwise.
const TilePlan& forced_tile_plan();

}  // namespace fastinfer
