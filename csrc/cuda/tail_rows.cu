// tail_rows: y[M, n0:N] = epilogue(x[M,K] · dequant(w[n0:N,K])ᵀ), n0 = N − N mod 16, the rows behind the tiles of a tile layout
// Source    own
// Layout    LAYOUTS.md#int4-row, #int8-row: rows behind the tiles are in row order
// Requires  sm80+, launched on sm90 (clusters); K % 128 == 0, at most 15 rows; 16-byte aligned operands
// Mapping   weights are the mma's 16-row operand, tokens its columns. A cluster has 16 tokens; all its warps share K, chunk by
//           chunk, and add up at the end, always in the same order: a block's warps, then the cluster's blocks.
//           A chunk is 16 bytes of a weight row a lane: lane 4g + t has the t-th quarter of it, of rows g and g + 8, and
//           the same positions of tokens g and g + 8. The dot product may visit K in any order, so that operands go
//           straight from global memory to the registers of the mma.
// Bound     latency: one round of loads a warp, two reductions
// Numerics  int4 weights are dequantised in fp32 and rounded to the type of x, int8 ones are exact; sums fp32 or int32
// Verified  tests/test_tail_rows.py

#include "cuda/tail_rows.cuh"

#include "common/hopper.cuh"
#include "common/mma.cuh"

namespace fastinfer {

constexpr int kTailWarps = 8, kTailTokenTiles = 2, kTailTokens = 8 * kTailTokenTiles, kTailRanks = 8;

// ---- weight formats: the weights beside a 16-byte piece of x, in the type and order of x --------------------------------

template <typename T>
struct TailInt8 {
  using Accumulator = float;
  static constexpr int kChunk = 64, kPieces = 2;  // columns; 16-byte pieces of x a lane and token
  struct Factors {
    __device__ Factors(const TailArgs&, int, int) {}
  };
  static __device__ __forceinline__ uint4 expand(const uint32_t (&words)[4], int piece, const Factors&) {
    uint32_t low[2], high[2];
    int8x4_to_pairs<T>(words[2 * piece], low);
    int8x4_to_pairs<T>(words[2 * piece + 1], high);
    return {low[0], low[1], high[0], high[1]};
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16<T>(c, a, b0, b1);
  }
};

struct TailInt8x8 {
  using Accumulator = int32_t;
  static constexpr int kChunk = 64, kPieces = 1;
  struct Factors {
    __device__ Factors(const TailArgs&, int, int) {}
  };
  static __device__ __forceinline__ uint4 expand(const uint32_t (&words)[4], int, const Factors&) {
    return {words[0], words[1], words[2], words[3]};
  }
  static __device__ __forceinline__ void mma(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k32_int8(c, a, b0, b1);
  }
};

template <typename T>
struct TailInt4 {
  using Accumulator = float;
  static constexpr int kChunk = 128, kPieces = 4;
  struct Factors {  // of a lane's 32 columns in a row, which lie in one group
    float scale, zero;
    __device__ Factors(const TailArgs& args, int row, int column) {
      const int at = row * args.groups + (column >> args.group_shift);
      scale = load_float(args.w_scale, args.scale_type, at), zero = load_float(args.w_zero, args.scale_type, at);
    }
  };
  static __device__ __forceinline__ uint4 expand(const uint32_t (&words)[4], int piece, const Factors& f) {
    Pack<T, 8> values;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values.v[i] = from_float<T>((static_cast<float>(words[piece] >> (4 * i) & 15) - f.zero) * f.scale);
    }
    return *reinterpret_cast<const uint4*>(&values);
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16<T>(c, a, b0, b1);
  }
};

// ---- kernel -------------------------------------------------------------------------------------------------------------

template <typename Accumulator>
__device__ __forceinline__ void add(Pack<Accumulator, 4>& sum, const Pack<Accumulator, 4>& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum.v[i] += v.v[i];
}

// This warp's share of the sums: chunks `first`, first + step, …
template <class Format>
__device__ __forceinline__ void multiply(const TailArgs& args, int token0, int first, int step, int lane,
                                         Pack<typename Format::Accumulator, 4> (&sums)[kTailTokenTiles]) {
  const int g = lane / 4, t = lane % 4, rows = args.epilogue.n - args.first_row, chunks = args.k / Format::kChunk;
  // Rows and tokens past the end repeat the last one and are not stored.
  const int row[2] = {min(g, rows - 1), min(g + 8, rows - 1)};
  const uint4 *w[2], *x[kTailTokenTiles];
#pragma unroll
  for (int h = 0; h < 2; ++h) w[h] = static_cast<const uint4*>(args.w) + int64_t(row[h]) * chunks * 4 + t;
#pragma unroll
  for (int tile = 0; tile < kTailTokenTiles; ++tile) {
    const int64_t token = min(token0 + 8 * tile + g, args.m - 1);
    x[tile] = static_cast<const uint4*>(args.x) + (token * chunks * 4 + t) * Format::kPieces;
  }
#pragma unroll 2
  for (int chunk = first; chunk < chunks; chunk += step) {
    uint32_t words[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 v = __ldg(w[h] + chunk * 4);
      words[h][0] = v.x, words[h][1] = v.y, words[h][2] = v.z, words[h][3] = v.w;
    }
    uint4 b[Format::kPieces][kTailTokenTiles];
#pragma unroll
    for (int piece = 0; piece < Format::kPieces; ++piece) {
#pragma unroll
      for (int tile = 0; tile < kTailTokenTiles; ++tile) {
        b[piece][tile] = __ldg(x[tile] + chunk * 4 * Format::kPieces + piece);
      }
    }
    const int column = chunk * Format::kChunk + t * (Format::kChunk / 4);
    const typename Format::Factors low(args, row[0], column), high(args, row[1], column);
#pragma unroll
    for (int piece = 0; piece < Format::kPieces; ++piece) {
      const uint4 p = Format::expand(words[0], piece, low), q = Format::expand(words[1], piece, high);
      const uint32_t a[2][4] = {{p.x, q.x, p.y, q.y}, {p.z, q.z, p.w, q.w}};
#pragma unroll
      for (int tile = 0; tile < kTailTokenTiles; ++tile) {
        Format::mma(sums[tile].v, a[0], b[piece][tile].x, b[piece][tile].y);
        Format::mma(sums[tile].v, a[1], b[piece][tile].z, b[piece][tile].w);
      }
    }
  }
}

template <class Format>
__global__ void __launch_bounds__(32 * kTailWarps) tail_rows_kernel(const __grid_constant__ TailArgs args) {
  using Sums = Pack<typename Format::Accumulator, 4>;
  __shared__ Sums slots[kTailWarps][kTailTokenTiles][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tile = warp;  // a warp stores what token tile, if any
  int ranks = 1, rank = 0;
#if __CUDA_ARCH__ >= 900
  ranks = cluster_size(), rank = cluster_rank();
#endif
  const int token0 = static_cast<int>(blockIdx.x) / ranks * kTailTokens;
  const RowTerms terms(args.epilogue, args.first_row + lane / 4);

  Sums sums[kTailTokenTiles] = {};
  multiply<Format>(args, token0, rank * kTailWarps + warp, ranks * kTailWarps, lane, sums);
#pragma unroll
  for (int i = 0; i < kTailTokenTiles; ++i) slots[warp][i][lane] = sums[i];
  __syncthreads();
  Sums total{};
  if (tile < kTailTokenTiles) {
#pragma unroll
    for (int w = 0; w < kTailWarps; ++w) add(total, slots[w][tile][lane]);
  }
#if __CUDA_ARCH__ >= 900
  if (ranks > 1) {
    if (tile < kTailTokenTiles) slots[0][tile][lane] = total;
    cluster_sync();
    if (rank == 0 && tile < kTailTokenTiles) {
      uint4 parts[kTailRanks];  // all on their way at once
#pragma unroll
      for (int r = 1; r < kTailRanks; ++r) {
        if (r < ranks) parts[r] = load_cluster16(map_to_rank(smem_address(&slots[0][tile][lane]), r));
      }
#pragma unroll
      for (int r = 1; r < kTailRanks; ++r) {
        if (r < ranks) add(total, *reinterpret_cast<const Sums*>(&parts[r]));
      }
    }
    cluster_sync();  // nobody leaves while its sums are being read
  }
#endif
  if (rank != 0 || tile >= kTailTokenTiles) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = token0 + 8 * tile + 2 * (lane % 4) + i % 2, row = terms.row + 8 * (i / 2);
    if (token < args.m && row < args.epilogue.n) {
      args.epilogue.store_value(token, row, terms.value(args.epilogue, token, i / 2, total.v[i]));
    }
  }
}

// ---- launch -------------------------------------------------------------------------------------------------------------

// Clusters are as large as there are multiprocessors and chunks of K for all their warps.
template <class Format>
static void launch(const char* op, const TailArgs& args, const LaunchContext& context) {
  const int64_t clusters = (int64_t(args.m) + kTailTokens - 1) / kTailTokens;
  int ranks = 1;
  while (ranks < kTailRanks && 2 * ranks * kTailWarps <= args.k / Format::kChunk &&
         2 * ranks * clusters <= context.limits().multiprocessors) {
    ranks *= 2;
  }
  launch_clusters(op, tail_rows_kernel<Format>, clusters * ranks, 32 * kTailWarps, ranks, 0, false, args, context);
}

void launch_tail_rows(const char* op, const TailArgs& args, ScalarType x_type, const LaunchContext& context) {
  if (x_type == ScalarType::Char) return launch<TailInt8x8>(op, args, context);
  const bool int4 = args.w_scale != nullptr;
  if (x_type == ScalarType::Half) {
    int4 ? launch<TailInt4<__half>>(op, args, context) : launch<TailInt8<__half>>(op, args, context);
  } else {
    int4 ? launch<TailInt4<__nv_bfloat16>>(op, args, context) : launch<TailInt8<__nv_bfloat16>>(op, args, context);
  }
}

}  // namespace fastinfer
