// int4_matmul in the layout tile_w4a16, one translation unit a dtype of x.
#pragma once

#include "cuda/tile_matmul.cuh"

namespace fastinfer {

void int4_tile_matmul_bf16(const TileProblem& p, const LaunchContext& context);
void int4_tile_matmul_half(const TileProblem& p, const LaunchContext& context);

template <typename T>
void int4_tile_matmul(const TileProblem& p, const LaunchContext& context) {
  switch (p.k / p.groups) {
    case 32:
      return run_tile_matmul<Int4Decode<T, 32>, Int4Wgmma<T, 32>, T>(p, context);
    case 64:
      return run_tile_matmul<Int4Decode<T, 64>, Int4Wgmma<T, 64>, T>(p, context);
    default:
      return run_tile_matmul<Int4Decode<T, 128>, Int4Wgmma<T, 128>, T>(p, context);
  }
}

}  // namespace fastinfer
