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
constexpr int kTailElements = 16 * kTailTokens;  // of y a cluster makes, one a thread of its first block
static_assert(kTailElements == 32 * kTailWarps);

// A float as stored. A conversion waits for its load, so it comes where the value is used.
__device__ __forceinline__ uint32_t load_bits(const void* data, Element type, int64_t i) {
  return type == Element::kFloat ? static_cast<const uint32_t*>(data)[i] : static_cast<const uint16_t*>(data)[i];
}
__device__ __forceinline__ float float_of(uint32_t bits, Element type) {
  if (type == Element::kFloat) return __uint_as_float(bits);
  return type == Element::kHalf ? __half2float(__ushort_as_half(bits)) : __uint_as_float(bits << 16);
}

// ---- weight formats: the weights beside a 16-byte piece of x, in the type and order of x --------------------------------

struct TailFactors {  // of a lane's weights in a row and chunk
  float scale, zero;
};

template <typename T>
struct TailInt8 {
  using Accumulator = float;
  static constexpr int kChunk = 64, kPieces = 2;  // columns; 16-byte pieces of x a lane and token
  static constexpr bool kGrouped = false;
  static __device__ __forceinline__ uint4 expand(const uint32_t (&words)[4], int piece, const TailFactors&) {
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
  static constexpr bool kGrouped = false;
  static __device__ __forceinline__ uint4 expand(const uint32_t (&words)[4], int, const TailFactors&) {
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
  static constexpr bool kGrouped = true;  // a lane's 32 columns lie in one group
  static __device__ __forceinline__ uint4 expand(const uint32_t (&words)[4], int piece, const TailFactors& f) {
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

// What a lane has of a chunk: of rows g and g + 8, and of its token of each tile.
template <class Format>
struct TailChunk {
  uint4 w[2], x[kTailTokenTiles][Format::kPieces];
  uint32_t scale[2], zero[2];  // bits
};

template <class Format>
struct TailSource {
  const TailArgs& args;
  const uint4 *w[2], *x[kTailTokenTiles];
  int group[2], t;

  // Rows and tokens past the end repeat the last one and are not stored.
  __device__ __forceinline__ TailSource(const TailArgs& given, int token0, int lane) : args(given), t(lane % 4) {
    const int last = args.epilogue.n - args.first_row - 1, pieces = args.k / Format::kChunk * 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = min(lane / 4 + 8 * h, last);
      w[h] = static_cast<const uint4*>(args.w) + int64_t(row) * pieces + t;
      group[h] = row * args.groups;
    }
#pragma unroll
    for (int tile = 0; tile < kTailTokenTiles; ++tile) {
      const int64_t token = min(token0 + 8 * tile + lane / 4, args.m - 1);
      x[tile] = static_cast<const uint4*>(args.x) + (token * pieces + t) * Format::kPieces;
    }
  }

  __device__ __forceinline__ void load(int chunk, TailChunk<Format>& out) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      out.w[h] = __ldg(w[h] + chunk * 4);
      if constexpr (Format::kGrouped) {
        const int at = group[h] + ((chunk * Format::kChunk + t * (Format::kChunk / 4)) >> args.group_shift);
        out.scale[h] = load_bits(args.w_scale, args.scale_type, at);
        out.zero[h] = load_bits(args.w_zero, args.scale_type, at);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTailTokenTiles; ++tile) {
#pragma unroll
      for (int piece = 0; piece < Format::kPieces; ++piece) {
        out.x[tile][piece] = __ldg(x[tile] + chunk * 4 * Format::kPieces + piece);
      }
    }
  }
};

template <class Format>
__device__ __forceinline__ void multiply_chunk(const TailArgs& args, const TailChunk<Format>& chunk,
                                               Pack<typename Format::Accumulator, 4> (&sums)[kTailTokenTiles]) {
  uint32_t words[2][4];
  TailFactors factors[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint4& v = chunk.w[h];
    words[h][0] = v.x, words[h][1] = v.y, words[h][2] = v.z, words[h][3] = v.w;
    if constexpr (Format::kGrouped) {
      factors[h] = {float_of(chunk.scale[h], args.scale_type), float_of(chunk.zero[h], args.scale_type)};
    }
  }
#pragma unroll
  for (int piece = 0; piece < Format::kPieces; ++piece) {
    const uint4 p = Format::expand(words[0], piece, factors[0]), q = Format::expand(words[1], piece, factors[1]);
    const uint32_t a[2][4] = {{p.x, q.x, p.y, q.y}, {p.z, q.z, p.w, q.w}};
#pragma unroll
    for (int tile = 0; tile < kTailTokenTiles; ++tile) {
      const uint4& b = chunk.x[tile][piece];
      Format::mma(sums[tile].v, a[0], b.x, b.y);
      Format::mma(sums[tile].v, a[1], b.z, b.w);
    }
  }
}

// What an element of y is made of besides its sum.
struct TailTerms {
  float x_scale = 1.f, w_scale = 1.f;
  uint32_t bias = 0, residual = 0;  // bits

  __device__ __forceinline__ void load(const Epilogue& e, int token, int row) {
    if (e.x_scale != nullptr) x_scale = e.x_scale[token];
    if (e.w_scale != nullptr) w_scale = e.w_scale[row];
    if (e.bias != nullptr) bias = load_bits(e.bias, e.bias_type, row);
    if (e.residual != nullptr) residual = load_bits(e.residual, e.y_type, int64_t(token) * e.y_stride + row);
  }
  // As Epilogue::value and store_value, rounding for rounding.
  __device__ __forceinline__ void store(const Epilogue& e, int token, int row, float sum) const {
    float v = __fmul_rn(__fmul_rn(sum, x_scale), w_scale);
    v = __fadd_rn(__fadd_rn(v, float_of(bias, e.bias_type)), float_of(residual, e.y_type));
    store_float(e.y, e.y_type, int64_t(token) * e.y_stride + row, v);
  }
};

template <class Format>
__global__ void __launch_bounds__(32 * kTailWarps) tail_rows_kernel(const __grid_constant__ TailArgs args) {
  using Accumulator = typename Format::Accumulator;
  __shared__ Pack<Accumulator, 4> slots[kTailWarps][kTailTokenTiles][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int ranks = 1, rank = 0;
#if __CUDA_ARCH__ >= 900
  ranks = cluster_size(), rank = cluster_rank();
#endif
  const int token0 = static_cast<int>(blockIdx.x) / ranks * kTailTokens;
  const int chunks = args.k / Format::kChunk, step = ranks * kTailWarps;

  const TailSource<Format> source(args, token0, lane);
  TailChunk<Format> next{};
  int chunk = rank * kTailWarps + warp;
  if (chunk < chunks) source.load(chunk, next);
  // This thread's element of y, element % 4 of what lane element / 4 % 32 holds of tile element / 128.
  const int element = threadIdx.x, from = element / 4 % 32, i = element % 4;
  const int token = token0 + element / 128 * 8 + from % 4 * 2 + i % 2, row = args.first_row + from / 4 + i / 2 * 8;
  const bool stores = rank == 0 && token < args.m && row < args.epilogue.n;
  TailTerms terms;
  if (stores) terms.load(args.epilogue, token, row);

  Pack<Accumulator, 4> sums[kTailTokenTiles] = {};
  for (; chunk < chunks; chunk += step) {
    const TailChunk<Format> now = next;
    if (chunk + step < chunks) source.load(chunk + step, next);
    multiply_chunk<Format>(args, now, sums);
  }
#pragma unroll
  for (int tile = 0; tile < kTailTokenTiles; ++tile) slots[warp][tile][lane] = sums[tile];
  __syncthreads();
  auto* elements = reinterpret_cast<Accumulator*>(slots);
  Accumulator sum = 0;
#pragma unroll
  for (int w = 0; w < kTailWarps; ++w) sum += elements[w * kTailElements + element];
#if __CUDA_ARCH__ >= 900
  if (ranks > 1) {
    elements[element] = sum;  // of the first warp's, which no other thread reads
    cluster_sync();
    uint32_t parts[kTailRanks];  // all on their way at once
#pragma unroll
    for (int r = 1; r < kTailRanks; ++r) {
      if (rank == 0 && r < ranks) parts[r] = load_cluster4(map_to_rank(smem_address(elements + element), r));
    }
#pragma unroll
    for (int r = 1; r < kTailRanks; ++r) {
      if (rank == 0 && r < ranks) sum += *reinterpret_cast<const Accumulator*>(&parts[r]);
    }
    cluster_sync();  // nobody leaves while its sums are being read
  }
#endif
  if (stores) terms.store(args.epilogue, token, row, static_cast<float>(sum));
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
