// Which kernel multiplies by weights in a tile layout, and how it is split: decode_matmul for few tokens, wgmma_matmul above;
// tail_rows for the rows behind the tiles.
#pragma once

#include <array>

#include "cuda/decode_matmul.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/tail_rows.cuh"
#include "cuda/wgmma_matmul.cuh"

namespace fastinfer {

// What every tile matmul is given. x [M, K] is contiguous and 16-byte aligned, K a multiple of 128. The kernels for whole
// tiles get it with N in multiples of 16; epilogue.y_stride stays that of y.
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
  FASTINFER_CHECK(op, shape.n >= 16 && shape.k % 128 == 0, "layout \"", layout,
                  "\" needs N of at least 16 and K in multiples of 128, got N = ", shape.n, ", K = ", shape.k);
}

// ---- few tokens -------------------------------------------------------------------------------------------------------------

template <class Format, int kTiles, int kTokenTiles>
bool try_decode(const TileProblem& p, const DecodeArgs& args, const DecodePlan& plan, const LaunchContext& context) {
  return launch_decode<Format, kTiles, kTokenTiles, 8>(p.op, args, p.n / 16, plan, context);
}

// False where x or the sums that ranks exchange do not fit the shared memory.
template <class Format>
bool run_decode(const TileProblem& p, bool dependent, const LaunchContext& context) {
  DecodeArgs args;
  args.x = p.x.const_data_ptr();
  args.x_stride = int64_t(p.k) * Format::kXBytes;
  args.w = static_cast<const unsigned char*>(p.w);
  args.w_scale = p.w_scale, args.w_zero = p.w_zero;
  args.half_scales = p.scale_type == Element::kHalf;
  args.epilogue = p.epilogue;
  args.m = p.m, args.units = p.k / 128, args.groups = p.groups;
  // Measured on an H200 (benchmarks/NOTES.md). Pairs of row tiles share each fragment of x where there are enough of them;
  // half of the shared memory leaves room for the next kernel's blocks; ranks share an x that is too large for one.
  const int limit = context.limits().smem_per_block, half = context.limits().smem_per_multiprocessor / 2 - 1024;
  const bool wide = p.n >= 64 * context.limits().multiprocessors;
  int ranks = 1;
  while (ranks < 8 && p.m * p.k * Format::kXBytes / ranks > 120 * 1024) ranks *= 2;
  DecodePlan plan{ranks, 0, wide ? 4 : 2, dependent};
  for (; plan.ranks <= 8; plan.ranks *= 2) {
    for (const int smem : {half, limit}) {
      if (wide && smem == half) continue;
      plan.smem_bytes = smem;
      const bool done = p.m <= 8 ? (wide ? try_decode<Format, 2, 1>(p, args, plan, context)
                                         : try_decode<Format, 1, 1>(p, args, plan, context))
                                 : (wide ? try_decode<Format, 2, 2>(p, args, plan, context)
                                         : try_decode<Format, 1, 2>(p, args, plan, context));
      if (done) return true;
    }
  }
  return false;
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
                           Kernel::smem_bytes(3, ranks), context);
}

template <class Format, typename Y>
void run_wgmma(const TileProblem& p, bool dependent, const LaunchContext& context) {
  WgmmaArgs args;
  args.w_scale = p.w_scale, args.w_zero = p.w_zero, args.scale_type = p.scale_type;
  args.epilogue = p.epilogue;
  args.m = p.m, args.groups = p.groups, args.row_tiles = p.n / 16;

  int shape = 0, ranks = 1;
  int64_t best = INT64_MAX;
  for (int r = 1; r <= 4; ++r) {
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

// ---- any number of tokens and rows ------------------------------------------------------------------------------------------

inline void run_tail_rows(const TileProblem& p, int tail, const LaunchContext& context) {
  const bool int4 = p.w_scale != nullptr;
  TailArgs args;
  args.x = p.x.const_data_ptr();
  args.first_row = p.n - tail;
  args.w = static_cast<const char*>(p.w) + int64_t(args.first_row) * (int4 ? p.k / 2 : p.k);
  if (int4) {
    const int64_t offset = int64_t(args.first_row) * p.groups * 2;  // scales and zero points are of 16 bits
    args.w_scale = static_cast<const char*>(p.w_scale) + offset;
    args.w_zero = static_cast<const char*>(p.w_zero) + offset;
    args.scale_type = p.scale_type, args.groups = p.groups;
    args.group_shift = __builtin_ctz(p.k / p.groups);
  }
  args.epilogue = p.epilogue;
  args.m = p.m, args.k = p.k;
  launch_tail_rows(p.op, args, p.x.scalar_type(), context);
}

constexpr int kDecodeTokens = 16;

template <class Decode, class Wgmma, typename Y>
void run_tile_matmul(const TileProblem& p, const LaunchContext& context) {
  const bool dependent = take_dependent_launch();
  const int tail = p.n % 16;
  TileProblem whole = p;
  whole.n -= tail, whole.epilogue.n -= tail;
  if (p.m > kDecodeTokens || !run_decode<Decode>(whole, dependent, context)) {
    run_wgmma<Wgmma, Y>(whole, dependent, context);
  }
  if (tail > 0) run_tail_rows(p, tail, context);
}

}  // namespace fastinfer
