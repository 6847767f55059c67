// Which kernel multiplies by weights in a tile layout, and how it is split: as a plan says (tile_plan.cuh), else by the
// heuristics here, decode_matmul for few tokens and wgmma_matmul above; tail_rows for the rows behind the tiles.
#pragma once

#include <array>

#include "cuda/decode_matmul.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/tail_rows.cuh"
#include "cuda/tile_plan.cuh"
#include "cuda/wgmma_matmul.cuh"

namespace fastinfer {

// What every tile matmul is given. x [M, K] is contiguous and 16-byte aligned, K a multiple of 128 (linear: of 32). The
// kernels for whole tiles get it with N in multiples of 16; epilogue.y_stride stays that of y.
struct TileProblem {
  const char* op;
  TileKind kind;
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
  FASTINFER_CHECK(op, shape.n >= 16 && shape.k > 0 && shape.k % 128 == 0, "layout \"", layout,
                  "\" needs N of at least 16 and K in multiples of 128, got N = ", shape.n, ", K = ", shape.k);
}

// ---- few tokens -------------------------------------------------------------------------------------------------------------

// A shape of decode_matmul: row tiles that a warp takes at a time, stages of its ring, warps of a CTA, how many share a row
// tile, CTAs a multiprocessor. The shared memory that is left over takes the next kernel's first CTAs.
struct DecodeShape {
  int tiles, depth, warps, k_warps, resident;
};
constexpr std::array<DecodeShape, 18> kDecodeShapes{{{1, 4, 8, 8, 2},
                                                     {1, 8, 8, 8, 2},
                                                     {1, 8, 8, 8, 1},
                                                     {2, 2, 8, 8, 2},
                                                     {2, 2, 8, 8, 1},
                                                     {2, 4, 8, 8, 2},
                                                     {2, 4, 8, 8, 1},
                                                     {2, 2, 8, 4, 2},
                                                     {2, 2, 8, 2, 2},
                                                     {1, 4, 8, 2, 2},
                                                     {1, 4, 8, 1, 2},
                                                     {2, 2, 8, 1, 2},
                                                     {2, 4, 8, 1, 2},
                                                     {1, 4, 16, 16, 1},
                                                     {1, 4, 16, 4, 1},
                                                     {1, 4, 16, 1, 1},
                                                     {2, 2, 16, 4, 1},
                                                     {2, 2, 16, 1, 1}}};
constexpr int kDecodeMaxRanks = 8, kDecodeTokens = 16;

template <class Format, int kShape>
bool try_decode(const TileProblem& p, const DecodeArgs& args, int ranks, bool dependent, const LaunchContext& context) {
  constexpr DecodeShape s = kDecodeShapes[kShape];
  const DecodePlan plan{ranks, s.resident, s.k_warps, dependent};
  return p.m <= 8 ? launch_decode<Format, s.tiles, 1, s.depth, s.warps>(p.op, args, plan, context)
                  : launch_decode<Format, s.tiles, 2, s.depth, s.warps>(p.op, args, plan, context);
}

template <class Format, size_t... kShapes>
bool try_decode(const TileProblem& p, const DecodeArgs& args, int ranks, int shape, bool dependent,
                const LaunchContext& context, std::index_sequence<kShapes...>) {
  bool done = false;
  ((shape == kShapes && (done = try_decode<Format, kShapes>(p, args, ranks, dependent, context))) || ...);
  return done;
}

// As planned, or by the heuristics. False where the plan asks too much, or x or the sums that ranks exchange do not fit the
// shared memory.
template <class Format>
bool run_decode(const TileProblem& p, const TilePlan& plan, bool dependent, const LaunchContext& context) {
  if (p.m > kDecodeTokens) return false;
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
  if (p.epilogue.halves && p.epilogue.gate != Gate::kNone) args.tile_rows = 8, args.second_row = p.n / 2;
  const auto run = [&](int ranks, int shape) {
    if (ranks & (ranks - 1)) return false;
    return try_decode<Format>(p, args, ranks, shape, dependent, context,
                              std::make_index_sequence<kDecodeShapes.size()>());
  };
  if (plan.kernel == TileKernel::kDecode) return run(plan.ranks, plan.shape);
  // Measured on an H100 (benchmarks/NOTES.md): a rank's part of x stays small, and where there are enough row tiles for all
  // multiprocessors a warp takes pairs of them, which share each fragment of x.
  constexpr bool kRows = kIsRows<Format>, kInt4 = Format::kUnitK == 128;
  const bool few = p.m <= 8, long_rows = kRows || (kInt4 && p.k >= 8192);
  const bool narrow = args.last_tile < context.limits().multiprocessors * (long_rows ? 2 : 1);
  const int shape = !few ? (kRows ? 2 : 17) : narrow ? 0 : kInt4 ? 3 : 1;
  int ranks = 1;
  while (ranks < kDecodeMaxRanks && int64_t(p.m) * p.k / ranks > (few || kRows ? 16 : 8) * 1024) ranks *= 2;
  while (ranks > 1 && args.units / ranks < 4) ranks /= 2;
  for (int fewer = ranks; fewer > 0; fewer /= 2) {  // more ranks keep more sums of each other's
    if (run(fewer, shape)) return true;
  }
  for (; ranks <= kDecodeMaxRanks; ranks *= 2) {
    if (run(ranks, shape) || run(ranks, 4)) return true;
  }
  return false;
}

// ---- many tokens ------------------------------------------------------------------------------------------------------------

// A shape of wgmma_matmul: tokens and warpgroups of a CTA, CTAs that share x, CTAs a multiprocessor; and what 128 k of a
// tile take it, in ns, measured on an H100 (benchmarks/NOTES.md).
struct WgmmaShape {
  int tokens, consumers, members, resident, unit_ns;
};
constexpr std::array<WgmmaShape, 8> kWgmmaShapes{{{32, 4, 1, 1, 830},
                                                  {64, 4, 1, 1, 1100},
                                                  {64, 2, 1, 1, 650},
                                                  {128, 2, 1, 1, 820},
                                                  {256, 2, 1, 1, 1400},
                                                  {256, 2, 2, 1, 1400},
                                                  {64, 4, 2, 1, 1100},
                                                  {64, 2, 1, 2, 650}}};

// Each rank needs enough of K to be worth its sums, and 256 tokens have too many of them to exchange.
inline bool can_split(const WgmmaShape& shape, int ranks, int k) {
  return ranks == 1 || (ranks <= k / 256 && shape.tokens < 256);
}

// What the heuristics choose from: with many tiles the L2 is the bound, and neighbours that share x spare it.
inline bool is_candidate(const WgmmaShape& shape, int m) {
  return shape.resident == 1 && shape.members == (shape.tokens == 256 && m > 4 * 256 ? 2 : 1);
}

// Clusters of `ranks` blocks that run at once, one block a multiprocessor.
template <class Format, typename Y>
int wgmma_clusters(int ranks, const LaunchContext& context) {
  using Kernel = WgmmaMatmul<Format, Y, 128, 2, 1, 1>;
  return resident_clusters(wgmma_matmul_kernel<Format, Y, 128, 2, 1, 1>, Kernel::kThreads, ranks,
                           Kernel::smem_bytes(3, ranks), context);
}

// The split and shape that the times of kWgmmaShapes promise most of.
template <class Format, typename Y>
TilePlan choose_wgmma(const TileProblem& p, const LaunchContext& context) {
  TilePlan plan{TileKernel::kWgmma};
  int64_t best = INT64_MAX;
  for (int r = 1; r <= kWgmmaMaxRanks; ++r) {
    const int clusters = wgmma_clusters<Format, Y>(r, context);
    for (int s = 0; s < static_cast<int>(kWgmmaShapes.size()); ++s) {
      const WgmmaShape& candidate = kWgmmaShapes[s];
      if (!is_candidate(candidate, p.m) || !can_split(candidate, r, p.k)) continue;
      const int64_t rows = 64 * candidate.consumers;
      const int64_t tiles = (p.n + rows - 1) / rows * ((p.m + candidate.tokens - 1) / candidate.tokens);
      const int64_t rounds = (tiles + clusters - 1) / clusters, units = (p.k / 128 + r - 1) / r;
      const int64_t ns = rounds * (units * candidate.unit_ns + 1500 + (r > 1 ? 1000 + 8 * candidate.tokens : 0));
      if (ns < best) best = ns, plan.ranks = r, plan.shape = s;
    }
  }
  return plan;
}

template <class Format, typename Y, size_t... kShapes>
void launch_wgmma(const TileProblem& p, int shape, const WgmmaArgs& args, const WgmmaPlan& plan,
                  const LaunchContext& context, std::index_sequence<kShapes...>) {
  const auto launch = [&](auto number) {
    constexpr WgmmaShape s = kWgmmaShapes[number];
    launch_wgmma<Format, Y, s.tokens, s.consumers, s.members, s.resident>(p.op, args, p.x, p.w, plan, context);
    return true;
  };
  ((shape == kShapes && launch(std::integral_constant<size_t, kShapes>{})) || ...);
}

// As planned, or by the heuristics. False where the plan asks too much.
template <class Format, typename Y>
bool run_wgmma(const TileProblem& p, const TilePlan& asked, bool dependent, const LaunchContext& context) {
  const TilePlan chosen = asked.kernel == TileKernel::kWgmma ? asked : choose_wgmma<Format, Y>(p, context);
  if (!can_split(kWgmmaShapes[chosen.shape], chosen.ranks, p.k)) return false;
  WgmmaArgs args;
  args.scales = {p.w_scale, p.w_zero, p.scale_type, p.groups};
  args.epilogue = p.epilogue;
  args.m = p.m, args.row_tiles = p.n / 16;
  launch_wgmma<Format, Y>(p, chosen.shape, args, {chosen.ranks, dependent}, context,
                          std::make_index_sequence<kWgmmaShapes.size()>());
  return true;
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

// A forced plan that could not run is an error; another is left for the heuristics.
inline void check_not_forced(const TileProblem& p, const TilePlan& plan) {
  FASTINFER_CHECK(p.op, !plan.forced, "the forced plan (kernel ", static_cast<int>(plan.kernel), ", ", plan.ranks,
                  " ranks, shape ", plan.shape, ") cannot run for M = ", p.m, ", N = ", p.n, ", K = ", p.k);
}

template <class Decode, class Wgmma, typename Y>
void run_whole_tiles(const TileProblem& p, const TilePlan& plan, bool dependent, const LaunchContext& context) {
  if (plan.kernel == TileKernel::kDecode && run_decode<Decode>(p, plan, dependent, context)) return;
  if (plan.kernel == TileKernel::kWgmma && run_wgmma<Wgmma, Y>(p, plan, dependent, context)) return;
  check_not_forced(p, plan);
  if (run_decode<Decode>(p, {}, dependent, context)) return;
  run_wgmma<Wgmma, Y>(p, {}, dependent, context);
}

template <class Decode, class Wgmma, typename Y>
void run_tile_matmul(const TileProblem& p, const LaunchContext& context) {
  const bool dependent = take_dependent_launch();
  const int group = p.kind == TileKind::kW4A16 ? p.k / p.groups : 0, tail = p.n % 16;
  const TilePlan plan = find_tile_plan(p.kind, group, p.m, p.n, p.k, context.limits());
  TileProblem whole = p;
  whole.n -= tail, whole.epilogue.n -= tail;
  run_whole_tiles<Decode, Wgmma, Y>(whole, plan, dependent, context);
  if (tail > 0) run_tail_rows(p, tail, context);
}

}  // namespace fastinfer
