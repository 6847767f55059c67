#include "cuda/int4_tile.cuh"

namespace fastinfer {

void int4_tile_matmul_half(const TileProblem& p, const LaunchContext& context) { int4_tile_matmul<__half>(p, context); }

}  // namespace fastinfer
