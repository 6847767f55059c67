#include "cuda/int4_tile.cuh"

namespace fastinfer {

void int4_tile_matmul_bf16(const TileProblem& p, const LaunchContext& context) {
  int4_tile_matmul<__nv_bfloat16>(p, context);
}

}  // namespace fastinfer
