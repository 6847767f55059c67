// What a tile layout is in memory: blocks of 64 rows, the last one of as many row tiles of 16 as there are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "common/mma.cuh"

namespace fastinfer {

constexpr int kUnit = 128;       // k that no kernel splits
constexpr int kBlockTiles = 4;   // row tiles of a block
constexpr int kBlockRows = 64;

__host__ __device__ inline int row_blocks_of(int row_tiles) { return (row_tiles + kBlockTiles - 1) / kBlockTiles; }
__host__ __device__ inline int tiles_of_block(int row_tiles, int block) {
  const int left = row_tiles - block * kBlockTiles;
  return left < kBlockTiles ? left : kBlockTiles;
}

// What 16 rows × 128 k are: kPieces pieces of kTileBytes, between which the pieces of the block's other row tiles lie.
struct Int4Tiles {
  static constexpr int kTileBytes = 512, kPieces = 2, kUnitBytes = kTileBytes * kPieces;
};
struct Int8Tiles {
  static constexpr int kTileBytes = 1024, kPieces = 2, kUnitBytes = kTileBytes * kPieces;
};
struct Int8x8Tiles {
  static constexpr int kTileBytes = 2048, kPieces = 1, kUnitBytes = kTileBytes * kPieces;
};

}  // namespace fastinfer
