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

constexpr int kDecodeTokens = 16;

// ---- few tokens -------------------------------------------------------------------------------------------------------------

// A shape of decode_matmul.
struct DecodeShape {
  int tiles, depth, warps, held;
};
constexpr std::array<DecodeShape, 12> kDecodeShapes{{{1, 4, 8, 0}, {1, 8, 8, 0}, {2, 2, 8, 0}, {2, 4, 8, 0}, {1, 4, 16, 0}, {2, 2, 16, 0}, {2, 4, 16, 0}, {1, 4, 8, 1}, {1, 4, 8, 2}, {1, 4, 16, 1}, {1, 4, 16, 2}, {4, 2, 8, 0}}};

template <class Format, int kShape>
bool try_decode(const TileProblem& p, const DecodeArgs& args, const DecodePlan& plan, const LaunchContext& context) {
  constexpr DecodeShape s = kDecodeShapes[kShape];
  return p.m <= 8 ? launch_decode<Format, s.tiles, 1, s.depth, s.warps, s.held>(p.op, args, plan, context)
                  : launch_decode<Format, s.tiles, 2, s.depth, s.warps, s.held>(p.op, args, plan, context);
}

template <class Format, int... kShapes>
bool try_shape(int shape, const TileProblem& p, const DecodeArgs& args, const DecodePlan& plan,
               const LaunchContext& context, std::integer_sequence<int, kShapes...>) {
  bool done = false;
  (void)((shape == kShapes && (done = try_decode<Format, kShapes>(p, args, plan, context), true)) || ...);
  return done;
}

// False where x or the sums that ranks exchange do not fit the shared memory.
template <class Format>
bool run_decode(const TileProblem& p, bool dependent, const LaunchContext& context) {
  DecodeArgs args;
  args.x = p.x.const_data_ptr();
  args.x_stride = int64_t(p.k) * static_cast<int64_t>(sizeof(typename Format::Element));
  args.w = static_cast<const unsigned char*>(p.w);
  args.w_stride = args.x_stride;  // of rows
  args.w_scale = static_cast<const unsigned char*>(p.w_scale);
  args.w_zero = static_cast<const unsigned char*>(p.w_zero);
  args.half_scales = p.scale_type == Element::kHalf;
  args.epilogue = p.epilogue;
  args.m = p.m, args.units = p.k / Format::kUnitK;
  args.last_row = p.n - 1, args.last_tile = (p.n + 15) / 16 - 1;
  const TilePlan& forced = forced_tile_plan();
  const auto run = [&](const DecodePlan& plan, int shape) {
    return try_shape<Format>(shape, p, args, plan, context,
                             std::make_integer_sequence<int, static_cast<int>(kDecodeShapes.size())>());
  };
  if (forced.kernel == TileKernel::kDecode) {
    FASTINFER_CHECK(p.op, run({forced.ranks, forced.resident, dependent}, forced.shape), "plan does not fit");
    return true;
  }
  for (int ranks = 1; ranks <= 8; ranks *= 2) {
    if (run({ranks, 2, dependent}, 0)) return true;
    if (run({ranks, 1, dependent}, 0)) return true;
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
  if (const TilePlan& forced = forced_tile_plan(); forced.kernel == TileKernel::kWgmma) {
    ranks = forced.ranks, shape = forced.shape;
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

template <class Decode, class Wgmma, typename Y>
void run_tile_matmul(const TileProblem& p, const LaunchContext& context) {
  const bool dependent = take_dependent_launch();
  if (p.m <= kDecodeTokens && forced_tile_plan().kernel != TileKernel::kWgmma && run_decode<Decode>(p, dependent, context)) return;
  run_wgmma<Wgmma, Y>(p, dependent, context);
}

}  // namespace fastinfer
