// Which kernel multiplies by weights in a tile layout, and how it is split: decode_matmul for few tokens, wgmma_matmul above.
#pragma once

#include <array>

#include "cuda/decode_matmul.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/tile_plan.cuh"
#include "cuda/wgmma_matmul.cuh"

namespace fastinfer {

// What every tile matmul is given. x [M, K] is contiguous and 16-byte aligned, K a multiple of 128, N of 16.
struct TileProblem {
  const char* op;
  const Tensor& x;
  const void* w;
  const void* w_scale = nullptr;  // int4 alone: int8's are in the epilogue
  const void* w_zero = nullptr;
  Element scale_type{};
  int groups = 1;
  Epilogue epilogue;
  int m = 0, n = 0, k = 0;
};

inline void check_tile_layout(const char* op, const MatmulShape& shape, const std::string& layout,
                              const LaunchContext& context) {
  FASTINFER_CHECK(op, context.limits().capability == 90, "layout \"", layout,
                  "\" needs a GPU of compute capability 9.0; use \"row\"");
  FASTINFER_CHECK(op, shape.n % 16 == 0 && shape.k % 128 == 0, "layout \"", layout,
                  "\" needs N in multiples of 16 and K in multiples of 128, got N = ", shape.n, ", K = ", shape.k);
}

// ---- few tokens -------------------------------------------------------------------------------------------------------------

// False where x does not fit the shared memory.
template <class Format, typename Y, int kTokens>
bool run_decode(const TileProblem& p, bool dependent, const LaunchContext& context) {
  DecodeArgs args;
  args.x = p.x.const_data_ptr();
  args.x_stride = int64_t(p.k) * Format::kXBytes;
  args.w = static_cast<const unsigned char*>(p.w);
  args.w_scale = p.w_scale, args.w_zero = p.w_zero;
  args.half_scales = p.scale_type == Element::kHalf;
  args.epilogue = p.epilogue;
  args.m = p.m, args.units = p.k / kUnit, args.row_tiles = p.n / 16;
  const int limit = context.limits().smem_per_block, half = context.limits().smem_per_multiprocessor / 2 - 1024;
  const TilePlan& forced = forced_tile_plan();
  if (forced.kernel == TileKernel::kDecode) {
    const DecodePlan plan{forced.ranks, forced.resident == 0 ? limit : half, forced.shape, std::max(1, forced.resident), dependent};
    return launch_decode<Format, Y, kTokens>(p.op, args, plan, context);
  }
  // Few ranks mean few sums to exchange, many ranks less of x for each CTA and an even share of the blocks.
  const int blocks = row_blocks_of(args.row_tiles), multiprocessors = context.limits().multiprocessors;
  DecodePlan plan{0, half, 1, 1, dependent};
  int64_t best = INT64_MAX;
  for (int ranks = 1; ranks <= 8 && ranks <= args.units; ranks *= 2) {
    const int slice = (args.units + ranks - 1) / ranks, clusters = std::min(blocks, multiprocessors / ranks);
    const int x_bytes = slice * kUnit * Format::kXBytes * p.m;
    if (x_bytes > 64 * 1024) continue;
    const int64_t rounds = (blocks + clusters - 1) / clusters;
    const int64_t cost = 16 * rounds * slice + 8 * ranks + x_bytes / 1024;
    if (cost < best) best = cost, plan.ranks = ranks;
  }
  if (plan.ranks == 0) plan.ranks = std::min(8, args.units);
  if (launch_decode<Format, Y, kTokens>(p.op, args, plan, context)) return true;
  plan.smem_bytes = limit, plan.resident = 1;
  return launch_decode<Format, Y, kTokens>(p.op, args, plan, context);
}

// ---- many tokens ------------------------------------------------------------------------------------------------------------

// A shape of wgmma_matmul and what 128 k of a tile take it, in ns; measured on an H200 (benchmarks/NOTES.md).
struct WgmmaShape {
  int tokens, consumers, unit_ns;
};
constexpr std::array<WgmmaShape, 5> kWgmmaShapes{
    {{32, 4, 980}, {64, 4, 1100}, {64, 2, 680}, {128, 2, 830}, {256, 2, 1430}}};

// Clusters of `ranks` blocks that run at once, one block a multiprocessor.
template <class Format, typename Y>
int wgmma_clusters(int ranks, const LaunchContext& context) {
  using Kernel = WgmmaMatmul<Format, Y, 128, 2, 1>;
  return resident_clusters(wgmma_matmul_kernel<Format, Y, 128, 2, 1>, Kernel::kThreads, ranks,
                           Kernel::smem_bytes(3, ranks), 1, context);
}

template <class Format, typename Y>
void run_wgmma(const TileProblem& p, bool dependent, const LaunchContext& context) {
  WgmmaArgs args;
  args.w_scale = p.w_scale, args.w_zero = p.w_zero, args.scale_type = p.scale_type;
  args.epilogue = p.epilogue;
  args.m = p.m, args.groups = p.groups, args.row_tiles = p.n / 16;

  int shape = 0, ranks = 1;
  int64_t best = INT64_MAX;
  const TilePlan& forced = forced_tile_plan();
  if (forced.kernel == TileKernel::kWgmma) shape = forced.shape, ranks = forced.ranks, best = 0;
  for (int r = 1; best > 0 && r <= 4; ++r) {
    if (r > 1 && r > p.k / 256) break;
    const int clusters = wgmma_clusters<Format, Y>(r, context);
    for (int s = 0; s < static_cast<int>(kWgmmaShapes.size()); ++s) {
      const WgmmaShape& candidate = kWgmmaShapes[s];
      if (candidate.tokens == 256 && r > 1) continue;  // too many sums to exchange
      const int64_t rows = 64 * candidate.consumers;
      const int64_t tiles = (p.n + rows - 1) / rows * ((p.m + candidate.tokens - 1) / candidate.tokens);
      const int64_t rounds = (tiles + clusters - 1) / clusters, units = (p.k / 128 + r - 1) / r;
      const int64_t ns = rounds * (units * candidate.unit_ns + 1500 + (r > 1 ? 1000 + 8 * candidate.tokens : 0));
      if (ns < best) best = ns, shape = s, ranks = r;
    }
  }
  const WgmmaPlan plan{ranks, dependent};
  switch (shape) {
    case 0:
      return launch_wgmma<Format, Y, 32, 4, 1>(p.op, args, p.x, p.w, plan, context);
    case 1:
      return launch_wgmma<Format, Y, 64, 4, 1>(p.op, args, p.x, p.w, plan, context);
    case 2:
      return launch_wgmma<Format, Y, 64, 2, 1>(p.op, args, p.x, p.w, plan, context);
    case 3:
      return launch_wgmma<Format, Y, 128, 2, 1>(p.op, args, p.x, p.w, plan, context);
    default:  // with many tiles the L2 is the bound, and neighbours that share x spare it
      return p.m > 4 * 256 ? launch_wgmma<Format, Y, 256, 2, 2>(p.op, args, p.x, p.w, plan, context)
                           : launch_wgmma<Format, Y, 256, 2, 1>(p.op, args, p.x, p.w, plan, context);
  }
}

constexpr int kDecodeTokens = 16;

template <class Decode, class Wgmma, typename Y>
void run_tile_matmul(const TileProblem& p, const LaunchContext& context) {
  const bool dependent = take_dependent_launch();
  const bool decode = p.m <= kDecodeTokens && forced_tile_plan().kernel != TileKernel::kWgmma;
  if (decode && (p.m <= 8 ? run_decode<Decode, Y, 8>(p, dependent, context) : run_decode<Decode, Y, 16>(p, dependent, context)))
    return;
  run_wgmma<Wgmma, Y>(p, dependent, context);
}

}  // namespace fastinfer
